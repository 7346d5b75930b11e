# The beginning of a firmware of 64 KiB (`guests.tiny` adds the jump at its end where a processor begins), for a machine
# whose whole stream is some 50 KiB. It stays in real mode and adds one to the dword at COUNTER for ever.
#
# It says A on the first serial port at first, and B whenever the low 16 bits of the count are zero.

.set COUNTER, 0x10000
.set COM1, 0x3f8

.code16
.globl _start
_start:
        cli
        movw    $(COUNTER >> 4), %ax
        movw    %ax, %ds
        movw    $COM1, %dx
        movb    $'A', %al
        outb    %al, %dx
count:
        incl    0
        movl    %cr4, %eax              # see sweep.S
        xorb    $0x10, %al
        movl    %eax, %cr4
        cmpw    $0, 0
        jne     count
        movb    $'B', %al
        outb    %al, %dx
        jmp     count
