# A boot sector that rewrites its working set for ever, as fast as it is told to. One guest serves a whole grid: what it
# does is told by PARAMETERS, which whoever runs it writes into its memory from outside, while it waits for `go`.
#
# A batch is BATCH pages: `words` dwords of each, `stride` bytes apart, get one added. `done` counts pages. A batch is
# due every `period` ticks of the time-stamp counter, or at once where that is 0; what is late by more than `slack` is
# dropped, so that a guest that was held up does not make up for it. While nothing is due the processor halts: the timer
# wakes it a thousand times a second.
#
# Each batch ends with a change of CR4.PSE, which makes TCG forget its translations: QEMU before 9.0 loses the dirty
# marks of pages that stay translated, and its guests would seem to write less than they do.
#
# It says A on the first serial port when it waits, and stores the counter in `ticks` at every tick until `go` is set.

.set LOW, 0x100000
.set BATCH, 32
.set COM1, 0x3f8
.set HERTZ, 1000

.set PARAMETERS, 0x9000
.set go, PARAMETERS
.set high, PARAMETERS + 4       # where the working set ends
.set words, PARAMETERS + 8
.set stride, PARAMETERS + 12
.set period, PARAMETERS + 16
.set slack, PARAMETERS + 20
.set ticks, PARAMETERS + 24     # 8 bytes
.set done, PARAMETERS + 32      # 8 bytes
.set next, PARAMETERS + 40      # 8 bytes: when the next batch is due

.set TABLE, 0xa000              # of interrupts
.set TIMER, 8                   # where the firmware has put interrupt 0

.code16
.globl _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   table_of_segments
        lidtl   table_of_interrupts
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
        movl    $PARAMETERS, %edi
        movl    $0x1000 / 2, %ecx       # the parameters, and the table behind them
        xorl    %eax, %eax
        rep stosl

        movl    $tick + 0x80000, %eax   # the selector is 8, the offset has 16 bits
        movl    %eax, TABLE + 8 * TIMER
        movl    $0x8e00, TABLE + 8 * TIMER + 4

        movb    $0xfe, %al              # the timer and nothing else
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        movb    $0x34, %al
        outb    %al, $0x43
        movb    $(1193182 / HERTZ) & 0xff, %al
        outb    %al, $0x40
        movb    $(1193182 / HERTZ) >> 8, %al
        outb    %al, $0x40
        sti

        movw    $COM1, %dx
        movb    $'A', %al
        outb    %al, %dx

waiting:
        hlt
        rdtsc
        movl    %eax, ticks
        movl    %edx, ticks + 4
        cmpl    $0, go
        je      waiting

        movl    $LOW, %ebx
again:
        cmpl    $0, period
        je      batch
        rdtsc
        movl    %eax, %esi
        movl    %edx, %edi
        subl    next, %eax
        sbbl    next + 4, %edx
        js      rest
        jnz     late
        cmpl    slack, %eax
        ja      late
        movl    next, %esi
        movl    next + 4, %edi
        addl    period, %esi
        adcl    $0, %edi
late:
        movl    %esi, next
        movl    %edi, next + 4
batch:
        movl    $BATCH, %ecx
page:
        movl    words, %esi
        movl    %ebx, %edi
word:
        incl    (%edi)
        addl    stride, %edi
        decl    %esi
        jnz     word
        addl    $0x1000, %ebx
        cmpl    high, %ebx
        jb      1f
        movl    $LOW, %ebx
1:      decl    %ecx
        jnz     page
        movl    %cr4, %eax
        xorb    $0x10, %al
        movl    %eax, %cr4
        addl    $BATCH, done
        adcl    $0, done + 4
        jmp     again
rest:
        hlt
        jmp     again

tick:
        pushl   %eax
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        iretl

        .balign 8
segments:
        .quad   0
        .quad   0x00cf9a000000ffff      # code, all of 4 GiB
        .quad   0x00cf92000000ffff      # data, the same
table_of_segments:
        .word   . - segments - 1
        .long   segments
table_of_interrupts:
        .word   0x7ff
        .long   TABLE

        .org    0x1fe
        .word   0xaa55
