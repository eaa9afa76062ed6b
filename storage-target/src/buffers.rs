//! Buffers for data in flight, kept between commands so that none is allocated on the way.

/// Sizes of buffers, in bytes, and how many of each are kept.
const CLASSES: [(usize, usize); 4] = [(4 << 10, 256), (16 << 10, 64), (128 << 10, 32), (1 << 20, 8)];

/// The buffers that are free.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    free: [Vec<Vec<u8>>; CLASSES.len()],
}

impl Buffers {
    /// A buffer of at least `len` bytes, with any content.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        for ((size, _), free) in CLASSES.iter().zip(&mut self.free) {
            if len <= *size {
                return free.pop().unwrap_or_else(|| vec![0; *size]);
            }
        }
        vec![0; len]
    }

    /// Gives a buffer back; one that fits no class is freed.
    pub fn give(&mut self, buffer: Vec<u8>) {
        for ((size, kept), free) in CLASSES.iter().zip(&mut self.free) {
            if buffer.len() == *size && free.len() < *kept {
                free.push(buffer);
                return;
            }
        }
    }
}
