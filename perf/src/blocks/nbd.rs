//! NBD, as far as a load needs it: newstyle negotiation with NBD_OPT_GO, simple replies.

use super::load::{Command, Output, Queue};
use anyhow::{Result, bail};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_GO: u32 = 7;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// A connection to an export.
pub struct Export {
    stream: TcpStream,
    /// Bytes of the read in each slot; zero for a write.
    reads: Vec<u32>,
    /// The read whose data is coming in, and how much of it is to come.
    data: Option<(u16, usize)>,
}

impl Export {
    /// Connects to the export of this name.
    pub fn connect(address: SocketAddr, name: &str) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut hello = [0; 18];
        (&stream).read_exact(&mut hello)?;
        if !hello.starts_with(b"NBDMAGIC") {
            bail!("no NBD server");
        }
        // NBD_FLAG_C_FIXED_NEWSTYLE and NBD_FLAG_C_NO_ZEROES.
        (&stream).write_all(&3_u32.to_be_bytes())?;
        let mut option = OPTION_MAGIC.to_vec();
        option.extend_from_slice(&OPTION_GO.to_be_bytes());
        option.extend_from_slice(&u32::try_from(name.len() + 6)?.to_be_bytes());
        option.extend_from_slice(&u32::try_from(name.len())?.to_be_bytes());
        option.extend_from_slice(name.as_bytes());
        option.extend_from_slice(&[0; 2]);
        (&stream).write_all(&option)?;
        loop {
            let mut reply = [0; 20];
            (&stream).read_exact(&mut reply)?;
            let (_, rest) = reply.split_at(12);
            let (kind, len) = rest.split_at(4);
            let (kind, len) = (u32::from_be_bytes(kind.try_into()?), u32::from_be_bytes(len.try_into()?));
            if len > 4096 {
                bail!("an option reply of {len} bytes");
            }
            let mut body = vec![0; usize::try_from(len)?];
            (&stream).read_exact(&mut body)?;
            match kind {
                1 => return Ok(Self { stream, reads: vec![0; 0x1_0000], data: None }),
                3 => {}
                _ => bail!("the export {name} is refused: {kind:08x}h"),
            }
        }
    }
}

impl Queue for Export {
    fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn encode(&mut self, command: Command, output: &mut Output) {
        if let Some(read) = self.reads.get_mut(usize::from(command.slot)) {
            *read = if command.is_read { command.len } else { 0 };
        }
        let mut request = [0; 28];
        let (magic, rest) = request.split_at_mut(4);
        magic.copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        let (flags_and_kind, rest) = rest.split_at_mut(4);
        flags_and_kind.copy_from_slice(&u32::from(!command.is_read).to_be_bytes());
        let (cookie, rest) = rest.split_at_mut(8);
        cookie.copy_from_slice(&u64::from(command.slot).to_be_bytes());
        let (offset, len) = rest.split_at_mut(8);
        offset.copy_from_slice(&command.offset.to_be_bytes());
        len.copy_from_slice(&command.len.to_be_bytes());
        output.head(&request);
        if !command.is_read {
            output.data(usize::try_from(command.len).unwrap_or(usize::MAX));
        }
    }

    fn decode(&mut self, bytes: &[u8], _output: &mut Output, done: &mut dyn FnMut(u16, bool)) -> Result<usize> {
        let mut rest = bytes;
        loop {
            if let Some((slot, left)) = &mut self.data {
                let (part, after) = rest.split_at((*left).min(rest.len()));
                *left -= part.len();
                rest = after;
                if *left > 0 {
                    break;
                }
                done(*slot, true);
                self.data = None;
            }
            let Some((reply, after)) = rest.split_first_chunk::<16>() else { break };
            let (magic, tail) = reply.split_at(4);
            let (error, cookie) = tail.split_at(4);
            if magic != REPLY_MAGIC.to_be_bytes() {
                bail!("no NBD reply");
            }
            rest = after;
            let slot = u16::try_from(u64::from_be_bytes(cookie.try_into()?))?;
            let len = self.reads.get(usize::from(slot)).copied().unwrap_or(0);
            match error == [0; 4] {
                true if len > 0 => self.data = Some((slot, usize::try_from(len)?)),
                good => done(slot, good),
            }
        }
        Ok(bytes.len() - rest.len())
    }
}
