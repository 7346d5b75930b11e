# A boot sector that changes the pages of LOW..high in eight ways for ever: those that XBZRLE tells apart. Page n is
# changed in the way n mod 8:
#
#   0 its first byte                   4 all of it
#   1 its last byte                    5 every other byte
#   2 two dwords far from each other   6 from all zero to one byte and back
#   3 a run of 256 bytes               7 written with what it holds already
#
# It says A on the first serial port before the first pass, and B after every `every` passes. Behind each page comes a
# change of CR4.PSE, for the reason given in sweep.S, and then a byte that is written once more: else the marks could be
# read between two of a page's writes, and the second would leave none.

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
        movl    $_start, %esp

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

        xorl    %ebp, %ebp              # passes made
again:
        movl    every, %esi
pass:
        incl    %ebp
        movl    $LOW, %ebx
page:
        movl    %ebx, %eax
        shrl    $12, %eax
        andl    $7, %eax
        movl    %ebx, %edi
        call    *ways(, %eax, 4)
        movl    %cr4, %eax
        xorb    $0x10, %al
        movl    %eax, %cr4
        movb    (%ebx), %al
        movb    %al, (%ebx)
        addl    $0x1000, %ebx
        cmpl    high, %ebx
        jb      page
        decl    %esi
        jnz     pass
        movb    $'B', %al
        outb    %al, %dx
        jmp     again

first:
        incb    (%ebx)
        ret
last:
        incb    0xfff(%ebx)
        ret
far:
        incl    0x80(%ebx)
        incl    0xf80(%ebx)
        ret
run:
        addl    $0x300, %edi
        movl    $256, %ecx
        jmp     fill
whole:
        movl    $4096, %ecx
fill:
        movl    %ebp, %eax
        rep stosb
        ret
every_other:
        movl    $2048, %ecx
1:      incb    (%edi)
        addl    $2, %edi
        decl    %ecx
        jnz     1b
        ret
to_zero:
        movl    %ebp, %eax
        andb    $1, %al
        movb    %al, 0x10(%ebx)
        ret
same:
        movl    $0x5a5a5a5a, 0x800(%ebx)
        ret

        .balign 4
ways:   .long   first, last, far, run, whole, every_other, to_zero, same

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
high:   .long   3 << 20
every:  .long   16

        .org    0x1fe
        .word   0xaa55
