//! The sending half of a live I/O queue.

use super::IO;
use crate::pdu::{self, Digests, Header};
use rustix::event::epoll;
use std::collections::VecDeque;
use std::io::{self, IoSlice, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Pieces of one writev.
const PIECES: usize = 64;

/// The sending half of a live I/O queue.
pub(super) struct Link {
    pub stream: Arc<TcpStream>,
    pub admin: Arc<TcpStream>,
    pub epoll: Arc<OwnedFd>,
    pub digests: Digests,
    pub align: usize,
    pub max_h2c_data: usize,
    pub in_capsule: usize,
    pub pieces: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    pub offset: usize,
    pub waits_for_room: bool,
}

pub(super) enum Piece {
    Head(Vec<u8>),
    Data { data: Arc<Vec<u8>>, start: usize, end: usize },
}

impl Link {
    pub fn push(&mut self, header: &Header, data: Option<(usize, usize, Arc<Vec<u8>>)>) {
        let len = data.as_ref().map_or(0, |(start, end, _)| end - start);
        if !matches!(self.pieces.back(), Some(Piece::Head(_))) {
            self.pieces.push_back(Piece::Head(Vec::with_capacity(128)));
        }
        if let Some(Piece::Head(head)) = self.pieces.back_mut() {
            pdu::encode(head, header, len, self.digests, self.align);
        }
        if let Some((start, end, data)) = data {
            let digest = self.digests.data.then(|| crc32c::crc32c(data.get(start..end).unwrap_or_default()));
            self.pieces.push_back(Piece::Data { data, start, end });
            if let Some(digest) = digest {
                self.pieces.push_back(Piece::Head(digest.to_le_bytes().to_vec()));
            }
        }
    }

    /// Writes as much as the socket takes. A broken socket shows itself to the reader.
    pub fn send(&mut self) {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let mut used = 0;
            for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
                let bytes = match piece {
                    Piece::Head(bytes) => bytes.as_slice(),
                    Piece::Data { data, start, end } => data.get(*start..*end).unwrap_or_default(),
                };
                let skip = if used == 0 { self.offset } else { 0 };
                *slot = IoSlice::new(bytes.get(skip..).unwrap_or_default());
                used += 1;
            }
            match (&*self.stream).write_vectored(slices.get(..used).unwrap_or_default()) {
                Ok(count) => self.consume(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if self.pieces.is_empty() == self.waits_for_room {
            self.waits_for_room = !self.pieces.is_empty();
            let out = if self.waits_for_room { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let data = epoll::EventData::new_u64(IO);
            let _ = epoll::modify(&*self.epoll, &*self.stream, data, epoll::EventFlags::IN | out);
        }
    }

    fn consume(&mut self, count: usize) {
        self.offset += count;
        while let Some(piece) = self.pieces.front() {
            let len = match piece {
                Piece::Head(bytes) => bytes.len(),
                Piece::Data { start, end, .. } => end - start,
            };
            if self.offset < len {
                return;
            }
            self.offset -= len;
            self.pieces.pop_front();
        }
    }
}
