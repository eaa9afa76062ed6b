//! Clients on this machine that want to speak to public addresses: HTTP CONNECT,
//! RFC 9110 section 9.3.6, with an address as its target.
//!
//! ```text
//!   asking ──"CONNECT 198.51.100.16:22 HTTP/1.1"──► connecting ──► open ──► gone
//!      └─ 400: makes no sense                           └─ 502: refused, or no answer
//! ```
//!
//! Bounds: `CLIENTS_MAX` clients, `REQUEST_MAX` bytes of a request; what one side
//! does not take is not read from the other.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};

use rustix::event::PollFlags;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use crate::gateway::Gateway;

const CLIENTS_MAX: usize = 128;
const REQUEST_MAX: usize = 4096;
const CHUNK: usize = 16 * 1024;

/// All clients.
#[derive(Default)]
pub struct Proxy(Vec<Client>);

struct Client {
    stream: TcpStream,
    phase: Phase,
    /// What the client has not taken yet.
    output: Vec<u8>,
    /// The client sends no more.
    ended: bool,
    /// The guest takes no more for now: a frame of it will change that.
    full: bool,
    /// The client was told that no more comes, when `output` was out.
    told: bool,
}

enum Phase {
    Asking(Vec<u8>),
    Connecting(SocketHandle),
    Open(SocketHandle),
    /// Only `output` is left.
    Leaving,
    Gone,
}

impl Proxy {
    /// Whether another client may come.
    pub fn has_room(&self) -> bool {
        self.0.len() < CLIENTS_MAX
    }

    /// Takes the clients that wait.
    pub fn accept(&mut self, listener: &TcpListener) {
        while self.has_room()
            && let Ok((stream, _)) = listener.accept()
        {
            if stream.set_nonblocking(true).is_ok() {
                // A keystroke is not to wait for the next one.
                let _ = stream.set_nodelay(true);
                self.0.push(Client {
                    stream,
                    phase: Phase::Asking(Vec::new()),
                    output: Vec::new(),
                    ended: false,
                    full: false,
                    told: false,
                });
            }
        }
    }

    /// What each client is waited for.
    pub fn interests(&self) -> impl Iterator<Item = (&TcpStream, PollFlags)> {
        self.0.iter().filter_map(|client| {
            let mut events = PollFlags::empty();
            if !client.output.is_empty() {
                events |= PollFlags::OUT;
            }
            if !client.ended && !client.full && matches!(client.phase, Phase::Asking(_) | Phase::Open(_)) {
                events |= PollFlags::IN;
            }
            (!events.is_empty()).then_some((&client.stream, events))
        })
    }

    /// Moves bytes both ways; whether any moved.
    pub fn serve(&mut self, gateway: &mut Gateway) -> bool {
        let mut moved = false;
        for client in &mut self.0 {
            moved |= client.serve(gateway);
        }
        self.0.retain(|client| !matches!(client.phase, Phase::Gone));
        moved
    }
}

impl Client {
    fn serve(&mut self, gateway: &mut Gateway) -> bool {
        let moved = match std::mem::replace(&mut self.phase, Phase::Gone) {
            Phase::Asking(request) => self.ask(request, gateway),
            Phase::Connecting(handle) => self.connect(handle, gateway),
            Phase::Open(handle) => self.exchange(handle, gateway),
            Phase::Leaving => {
                self.phase = Phase::Leaving;
                false
            }
            Phase::Gone => false,
        };
        let before = self.output.len();
        if self.flush().is_err() {
            self.hang_up(gateway);
        } else if self.output.is_empty() && matches!(self.phase, Phase::Leaving) {
            self.phase = Phase::Gone;
        }
        moved || self.output.len() != before
    }

    fn ask(&mut self, mut request: Vec<u8>, gateway: &mut Gateway) -> bool {
        let mut bytes = [0; 512];
        match self.stream.read(&mut bytes) {
            Ok(0) => return false,
            Ok(count) => request.extend(&bytes[..count]),
            Err(error) if is_later(error.kind()) => {
                self.phase = Phase::Asking(request);
                return false;
            }
            Err(_) => return false,
        }
        if REQUEST_MAX < request.len() {
            return self.refuse("400 Bad Request");
        }
        let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") else {
            self.phase = Phase::Asking(request);
            return true;
        };
        match target(&request[..end]).map(|target| gateway.connect(target)) {
            // A client that speaks before it is answered does not speak CONNECT.
            _ if end + 4 < request.len() => self.refuse("400 Bad Request"),
            None => self.refuse("400 Bad Request"),
            Some(None) => self.refuse("502 Bad Gateway"),
            Some(Some(handle)) => {
                self.phase = Phase::Connecting(handle);
                true
            }
        }
    }

    fn connect(&mut self, handle: SocketHandle, gateway: &mut Gateway) -> bool {
        match gateway.socket(handle).state() {
            State::SynSent | State::SynReceived => {
                self.phase = Phase::Connecting(handle);
                false
            }
            State::Closed => {
                gateway.forget(handle);
                self.refuse("502 Bad Gateway")
            }
            _ => {
                gateway.opened(handle);
                self.output.extend(b"HTTP/1.1 200 Connected\r\n\r\n");
                self.phase = Phase::Open(handle);
                true
            }
        }
    }

    fn exchange(&mut self, handle: SocketHandle, gateway: &mut Gateway) -> bool {
        let socket = gateway.socket(handle);
        let mut moved = false;
        while !self.ended && socket.can_send() {
            let mut bytes = [0; CHUNK];
            let room = (socket.send_capacity() - socket.send_queue()).min(CHUNK);
            match self.stream.read(&mut bytes[..room]) {
                Ok(0) => {
                    self.ended = true;
                    socket.close();
                }
                Ok(count) => drop(socket.send_slice(&bytes[..count])),
                Err(error) if is_later(error.kind()) => break,
                Err(_) => {
                    self.phase = Phase::Open(handle);
                    self.hang_up(gateway);
                    return true;
                }
            }
            moved = true;
        }
        self.full = !socket.can_send();
        while self.output.len() < CHUNK && socket.can_recv() {
            let mut bytes = [0; CHUNK];
            let count = socket.recv_slice(&mut bytes).unwrap_or(0);
            self.output.extend(&bytes[..count]);
            moved |= count != 0;
        }
        if !socket.may_recv() && self.output.is_empty() && !self.told {
            self.told = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        let over = matches!(socket.state(), State::Closed | State::TimeWait);
        if over && self.output.is_empty() {
            gateway.forget(handle);
            return true;
        }
        self.phase = Phase::Open(handle);
        moved
    }

    fn refuse(&mut self, status: &str) -> bool {
        self.output.extend(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").bytes());
        self.phase = Phase::Leaving;
        true
    }

    /// Writes what the client takes now.
    fn flush(&mut self) -> Result<(), ErrorKind> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(ErrorKind::WriteZero),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if is_later(error.kind()) => return Ok(()),
                Err(error) => return Err(error.kind()),
            }
        }
        Ok(())
    }

    /// The client is gone: so is what it was connected to, once the reset is out.
    fn hang_up(&mut self, gateway: &mut Gateway) {
        self.output.clear();
        self.ended = true;
        match std::mem::replace(&mut self.phase, Phase::Gone) {
            Phase::Connecting(handle) | Phase::Open(handle) => {
                gateway.socket(handle).abort();
                self.phase = Phase::Open(handle);
            }
            _ => {}
        }
    }
}

fn is_later(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// The address in the first line of a request.
fn target(head: &[u8]) -> Option<SocketAddrV4> {
    let line = std::str::from_utf8(head).ok()?.lines().next()?;
    let (target, version) = line.strip_prefix("CONNECT ")?.split_once(' ')?;
    let target: SocketAddrV4 = target.parse().ok()?;
    (version.starts_with("HTTP/1.") && target.port() != 0).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connect_to_an_address_and_a_port_is_understood() {
        let wanted = Some("198.51.100.16:22".parse().unwrap());
        assert_eq!(target(b"CONNECT 198.51.100.16:22 HTTP/1.1"), wanted);
        assert_eq!(target(b"CONNECT 198.51.100.16:22 HTTP/1.1\r\nHost: x"), wanted);
        for line in [
            &b"GET / HTTP/1.1"[..],
            b"CONNECT 198.51.100.16 HTTP/1.1",
            b"CONNECT 198.51.100.16:0 HTTP/1.1",
            b"CONNECT [::1]:22 HTTP/1.1",
            b"CONNECT 198.51.100.16:22",
            b"CONNECT 198.51.100.16:22 SSH",
            b"\xff",
            b"",
        ] {
            assert_eq!(target(line), None, "{}", String::from_utf8_lossy(line));
        }
    }
}
