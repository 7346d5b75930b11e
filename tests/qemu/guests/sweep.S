# A boot sector that adds one to the first byte of every page of LOW..high, page after page, sweep after sweep, for
# ever. Wherever it is stopped, the pages below some place are one step ahead of those above it, and all other bytes are
# zero: a page that was lost, torn or sent too early is seen (`guests.check_sweep`).
#
# It says A on the first serial port before the first sweep, and B after every `every` sweeps.
#
# Each sweep ends with a change of CR4.PSE, which makes TCG forget its translations: QEMU before 9.0 loses the dirty
# marks of pages that stay translated.

.set LOW, 0x100000
.set COM1, 0x3f8

.code16
.globl _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   table_of_segments
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $0x08, $flat

.code32
flat:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss

        # What the firmware has left there would not be zero.
        cld
        movl    $LOW, %edi
        movl    high, %ecx
        subl    %edi, %ecx
        shrl    $2, %ecx
        xorl    %eax, %eax
        rep stosl

        movw    $COM1, %dx
        movb    $'A', %al
        outb    %al, %dx

again:
        movl    every, %ecx
sweep:
        movl    $LOW, %edi
page:
        incb    (%edi)
        addl    $0x1000, %edi
        cmpl    high, %edi
        jb      page
        movl    %cr4, %eax
        xorb    $0x10, %al
        movl    %eax, %cr4
        decl    %ecx
        jnz     sweep
        movb    $'B', %al
        outb    %al, %dx
        jmp     again

        .balign 8
segments:
        .quad   0
        .quad   0x00cf9a000000ffff      # code, all of 4 GiB
        .quad   0x00cf92000000ffff      # data, the same
table_of_segments:
        .word   . - segments - 1
        .long   segments

        # Whoever starts the guest puts in what fits the machine.
        .org    0x1f0
high:   .long   64 << 20
every:  .long   16

        .org    0x1fe
        .word   0xaa55
