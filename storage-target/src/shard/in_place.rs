//! Reads and writes of volumes in memory, without a buffer and without a batch.

use super::*;
use crate::nvme::Sqe;

impl Shard {
    /// Executes a read or a write where the volume keeps its blocks; false when the command has to go the
    /// long way: another opcode, digests over data, or limits that hold it back.
    pub(super) fn execute_in_place(&mut self, key: usize, slot: usize, volume: usize, sqe: &Sqe) -> bool {
        let opcode = sqe.opcode();
        if !matches!(opcode, opcode::READ | opcode::WRITE) {
            return false;
        }
        let now = self.now;
        let Some(served) = self.volumes.get_mut(volume) else { return false };
        let range = match byte_range(sqe.lba(), sqe.blocks(), served.engine.size()) {
            _ if sqe.nsid() != NSID => Err(NvmeStatus::INVALID_NAMESPACE),
            range => range,
        };
        let (offset, bytes) = match range {
            Ok(range) => range,
            Err(status) => {
                self.answer(key, slot, status.dnr(), 0);
                return true;
            }
        };
        let Some(connection) = self.connections.get_mut(key) else { return true };
        let lends = connection.is_in_place();
        if opcode == opcode::READ && !lends {
            return false;
        }
        if !served.throttled.is_empty() || served.qos.admit(now, Cost::of_transfer(bytes)).is_err() {
            return false;
        }
        if opcode == opcode::WRITE && served.lends {
            self.settle(volume);
        }
        let (Some(served), Some(connection)) = (self.volumes.get_mut(volume), self.connections.get_mut(key)) else { return true };
        let (Engine::Ram(ram), Some(command)) = (&mut served.engine, connection.command_mut(slot)) else { return false };
        let (len, took) = (command.len, now.saturating_sub(command.since));
        if opcode == opcode::READ {
            std::hint::black_box(ram.touch(offset, len));
            connection.respond_lent(slot, offset);
            account(&mut served.traffic, &self.shared.counting, opcode, len, None, took);
            return true;
        }
        let data = if command.inline.is_empty() { command.buffer.get(..len) } else { self.scratch.get(command.inline.clone()) };
        let error = ram.write(offset, data.unwrap_or_default()).err().map(|error| {
            tracing::error!(volume = served.spec.id, %error, "no memory for a volume");
            NvmeStatus::CAPACITY.dnr()
        });
        account(&mut served.traffic, &self.shared.counting, opcode, len, error, took);
        self.respond(key, slot, error.unwrap_or(NvmeStatus::SUCCESS), 0);
        true
    }

    /// Copies what a volume in memory has lent to sockets, before it changes.
    pub(super) fn settle(&mut self, volume: usize) {
        let Some(Served { engine: Engine::Ram(ram), lends, .. }) = self.volumes.get_mut(volume) else { return };
        if !std::mem::take(lends) {
            return;
        }
        let number = u32::try_from(volume).ok();
        for (_, connection) in &mut self.connections {
            if connection.has_lent() && connection.queue.is_some_and(|queue| queue.volume == number) {
                connection.settle(ram, &mut self.buffers);
            }
        }
    }
}
