//! Little-endian fields at fixed offsets, as NVMe lays out everything.
//!
//! Reads beyond the end give zero and writes beyond it do nothing: callers work on arrays whose size the
//! type states, so neither happens, and no offset can panic.

/// The byte at `at`.
pub(crate) fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// The 16-bit field at `at`.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

/// The 32-bit field at `at`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// The 64-bit field at `at`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// `N` bytes at `at`.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

/// Copies `value` to `at`.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end)) {
        slot.copy_from_slice(value);
    }
}

/// Copies `text` to `at`, padded with spaces to `len` bytes, as NVMe's ASCII fields are.
pub(crate) fn put_ascii(bytes: &mut [u8], at: usize, len: usize, text: &str) {
    if let Some(slot) = at.checked_add(len).and_then(|end| bytes.get_mut(at..end)) {
        for (to, from) in slot.iter_mut().zip(text.bytes().chain(std::iter::repeat(b' '))) {
            *to = from;
        }
    }
}

/// A NUL-terminated name at `at` of at most `len` bytes; `None` when it is not UTF-8 or has no end.
pub(crate) fn name_at(bytes: &[u8], at: usize, len: usize) -> Option<&str> {
    let field = bytes.get(at..at.checked_add(len)?)?;
    let end = field.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(field.get(..end)?).ok()
}

/// Widens a length of memory, which is at most 64 bits on every machine that this runs on.
pub(crate) fn wide(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Narrows a length that was bounded before; saturates instead of wrapping.
pub(crate) fn narrow(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Narrows to 32 bits; saturates instead of wrapping.
pub(crate) fn narrow32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
