//! What a connection has to say: heads in one buffer, data where it is, one writev for as much as there is.

use super::*;

#[derive(Debug)]
pub(super) enum Piece {
    /// A range of `heads`, from its start of all time.
    Head {
        start: usize,
        len: usize,
    },
    Data {
        buffer: Vec<u8>,
        len: usize,
        held: usize,
    },
    /// Bytes of the volume in memory.
    Lent {
        offset: u64,
        len: usize,
    },
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Head { len, .. } | Self::Data { len, .. } | Self::Lent { len, .. } => *len,
        }
    }
}

impl Connection {
    /// Answers a command with the first `len` bytes of a buffer.
    pub fn respond_data(&mut self, slot: usize, buffer: Vec<u8>, len: usize) {
        let Some(command) = self.commands.try_remove(slot) else { return };
        let cid = command.sqe.cid();
        self.cid_give(cid);
        if !self.answers() {
            self.held -= command.held.min(self.held);
            return;
        }
        let digest = self.digests.data.then(|| crc32c::crc32c(buffer.get(..len).unwrap_or_default()));
        self.push_data(cid, len, Piece::Data { buffer, len, held: command.held }, digest);
    }

    /// Answers a command with bytes that the volume lends.
    pub fn respond_lent(&mut self, slot: usize, offset: u64) {
        let Some(command) = self.commands.try_remove(slot) else { return };
        let (cid, len) = (command.sqe.cid(), command.len);
        self.cid_give(cid);
        if self.answers() {
            self.lent += 1;
            self.push_data(cid, len, Piece::Lent { offset, len }, None);
        }
    }

    /// Data, and the end of its command: in the same PDU where the host does not ask for a queue head.
    pub(super) fn push_data(&mut self, cid: u16, len: usize, piece: Piece, digest: Option<u32>) {
        let success = self.queue.as_ref().is_some_and(|queue| queue.flow_control_off);
        let data = Data { cid, ttag: 0, offset: 0, len: crate::bytes::narrow32(len), last: true, success };
        self.push_head(&Header::C2hData(data), len);
        self.pieces.push_back(piece);
        if let Some(digest) = digest {
            self.push_bytes(|heads| heads.extend_from_slice(&digest.to_le_bytes()));
        }
        if !success {
            self.push_response(cid, NvmeStatus::SUCCESS, 0);
        }
    }

    /// Whether bytes of the volume wait for the socket.
    pub fn has_lent(&self) -> bool {
        self.lent > 0
    }

    /// Copies what is lent, since the volume is about to change.
    pub fn settle(&mut self, ram: &Ram, buffers: &mut Buffers) {
        for piece in &mut self.pieces {
            if let Piece::Lent { offset, len } = *piece {
                let mut buffer = buffers.take(len);
                ram.read(offset, buffer.get_mut(..len).unwrap_or_default());
                self.held += len;
                *piece = Piece::Data { buffer, len, held: len };
            }
        }
        self.lent = 0;
    }

    pub(super) fn push_response(&mut self, cid: u16, status: NvmeStatus, dw0: u64) {
        let sq_head = self.queue.as_ref().map_or(0, Queue::head);
        let cqe = Cqe { dw0, sq_head, cid, status }.encode();
        self.push_head(&Header::Response { cqe }, 0);
    }

    pub(super) fn push_head(&mut self, header: &Header, data_len: usize) {
        let (digests, align) = (self.digests, self.align);
        self.push_bytes(|heads| pdu::encode(heads, header, data_len, digests, align));
    }

    pub(super) fn push_bytes(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.heads.len();
        write(&mut self.heads);
        let added = self.heads.len() - before;
        match self.pieces.back_mut() {
            Some(Piece::Head { len, .. }) => *len += added,
            _ => self.pieces.push_back(Piece::Head { start: self.heads_base + before, len: added }),
        }
    }

    /// Something waits to be sent.
    pub fn has_output(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Sends as much as the socket takes; `ram` is the volume that lends.
    pub fn send(&mut self, buffers: &mut Buffers, ram: Option<&Ram>) -> Received {
        while self.has_output() {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let used = self.gather(&mut slices, ram);
            let slices = slices.get(..used).unwrap_or_default();
            if slices.is_empty() {
                return Received::Closed; // a lender that is gone: nothing can be said any more
            }
            match (&self.stream).write_vectored(slices) {
                Ok(0) => return Received::Closed,
                Ok(count) => self.consume(count, buffers),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Received::Open,
                Err(_) => return Received::Closed,
            }
        }
        if let State::Closing { said, .. } = &mut self.state
            && !*said
        {
            // The host need not wait for us to close; we wait for it, so that no reset overtakes the word.
            *said = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Received::Open
    }

    /// The bytes to send next, as far as slices go; how many there are.
    pub(super) fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES], ram: Option<&'a Ram>) -> usize {
        let mut used = 0;
        let mut skip = self.sent;
        for piece in &self.pieces {
            let mut next = 0;
            while next < piece.len() {
                let bytes = match piece {
                    Piece::Head { start, len } => {
                        let at = start - self.heads_base;
                        self.heads.get(at..at + len)
                    }
                    Piece::Data { buffer, len, .. } => buffer.get(..*len),
                    // Up to the end of a chunk.
                    Piece::Lent { offset, len } => ram.map(|ram| ram.slice(offset + crate::bytes::wide(next), len - next)),
                };
                let (Some(bytes), Some(slot)) = (bytes.filter(|bytes| !bytes.is_empty()), slices.get_mut(used)) else { return used };
                next += bytes.len();
                let unsent = bytes.get(skip.min(bytes.len())..).unwrap_or_default();
                skip -= bytes.len() - unsent.len();
                if !unsent.is_empty() {
                    *slot = IoSlice::new(unsent);
                    used += 1;
                }
            }
        }
        used
    }

    /// Drops what was sent, and lets waiting commands have its room.
    pub(super) fn consume(&mut self, count: usize, buffers: &mut Buffers) {
        self.sent += count;
        while let Some(piece) = self.pieces.front() {
            if self.sent < piece.len() {
                break;
            }
            self.sent -= piece.len();
            match self.pieces.pop_front() {
                Some(Piece::Data { buffer, held, .. }) => {
                    self.held -= held.min(self.held);
                    buffers.give(buffer);
                }
                Some(Piece::Lent { .. }) => self.lent -= 1,
                Some(Piece::Head { .. }) | None => {}
            }
        }
        match self.pieces.iter().find_map(|piece| if let Piece::Head { start, .. } = piece { Some(*start) } else { None }) {
            None => {
                self.heads_base += self.heads.len();
                self.heads.clear();
            }
            Some(first) if first - self.heads_base > HEADS_KEPT => {
                self.heads.drain(..first - self.heads_base);
                self.heads_base = first;
            }
            Some(_) => {}
        }
        self.admit(buffers);
    }
}
