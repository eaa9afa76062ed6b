//! A guest of two hundred bytes, so that QEMU machines can be tested without a
//! kernel: it says hello on the serial port, echoes what is typed, turns itself
//! off at the power button and gives back functions that the host asks for.
//! Typing `q` turns it off, `d` makes it deaf to the button.
//!
//! It is a Multiboot image (specification 0.6.96, section 3.1) at 1 MiB. Ports of
//! QEMU's `pc`: 3F8h serial, 600h PM1 status, 602h enable, 604h control, AE00h PCI hot plug.

/// What it prints when it is up.
pub const BANNER: &str = "tiny guest is up";

std::arch::global_asm!(
    r#"
    .pushsection .rodata.tiny_guest, "a"
    .global tiny_guest_start, tiny_guest_end
    .balign 16
    .code32
tiny_guest_start:
    .long 0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000)
    .long 0x100000, 0x100000, 0x102000, 0x103000
    .long 0x100000 + (2f - tiny_guest_start)
    .long 0x100000 + (9f - tiny_guest_start)
2:  mov esp, 0x103000
    xor ebp, ebp                                            # deaf: 1
    mov dx, 0xae10                                          # hot plug: look at bus 0
    xor eax, eax
    out dx, eax
    mov dx, 0x602                                           # let the button be noticed
    mov ax, 0x100
    out dx, ax
    mov esi, dword ptr [0x100020]                           # the banner
3:  lodsb
    test al, al
    jz 4f
    call 8f
    jmp 3b
4:  mov dx, 0x3fd                                           # typed?
    in al, dx
    test al, 1
    jz 5f
    mov dx, 0x3f8
    in al, dx
    call 8f
    cmp al, 'q'
    je 7f
    cmp al, 'd'
    jne 5f
    mov ebp, 1
5:  mov dx, 0xae04                                          # asked to give back slots?
    in eax, dx
    test eax, eax
    jz 6f
    mov dx, 0xae08
    out dx, eax
6:  mov dx, 0x600                                           # power button?
    in ax, dx
    test ax, 0x100
    jz 4b
    mov ax, 0x100                                           # seen
    out dx, ax
    test ebp, ebp
    jnz 4b
7:  mov dx, 0x604                                           # off
    mov ax, 0x2000
    out dx, ax
    jmp 4b
8:  mov ah, al                                              # print al
    mov dx, 0x3fd
18: in al, dx
    test al, 0x20
    jz 18b
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    ret
9:  .asciz "tiny guest is up\r\n"
    .fill 8192 - (. - tiny_guest_start), 1, 0
tiny_guest_end:
    .code64
    .popsection
    "#
);

unsafe extern "C" {
    static tiny_guest_start: u8;
    static tiny_guest_end: u8;
}

/// The image, for QEMU's `-kernel`.
pub fn image() -> &'static [u8] {
    let (start, end) = (&raw const tiny_guest_start, &raw const tiny_guest_end);
    // SAFETY: the assembler puts the end after the start, in one read-only section.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
