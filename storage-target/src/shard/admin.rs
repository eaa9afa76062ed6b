//! Commands of admin queues: what the controller decides, carried out on connections and volumes.

use super::*;

impl Shard {
    /// Executes a command of an admin queue.
    pub(super) fn admin(&mut self, key: usize, slot: usize, queue: Queue) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let reached = connection.stream().local_addr().unwrap_or(self.shared.address);
        let Some(command) = connection.command_mut(slot) else { return };
        let (sqe, len) = (command.sqe, command.len);
        let served = queue.volume.and_then(|volume| self.volumes.get(crate::bytes::narrow(volume.into())));
        let Some(controller) = self.controllers.get_mut(&queue.controller) else { return };
        controller.seen(self.now);
        let (shared, host) = (&self.shared, controller.host.nqn.clone());
        let under_way = queues_length(&self.connections, queue.volume);
        let facts = Facts {
            volume: served.map(|served| VolumeFacts {
                id: &served.spec.id,
                size_bytes: served.engine.size(),
                shared: served.spec.access != Access::Exclusive,
                failed: served.engine.has_failed(),
                traffic: &served.traffic,
                queue_length: under_way,
            }),
            discovery_log: &|| discovery_log(shared, reached, &host),
            now: self.now,
        };
        match controller.admin(slot, &sqe, &facts) {
            Answer::Value(dw0) => self.answer(key, slot, NvmeStatus::SUCCESS, dw0),
            // nvme-cli asks for every property that there might be, and takes the plain status for "not here".
            Answer::Fail(status) if sqe.opcode() == opcode::FABRICS => self.answer(key, slot, status, 0),
            Answer::Fail(status) => self.answer(key, slot, status.dnr(), 0),
            Answer::Held => self.events(queue.controller),
            Answer::Data(mut page) => {
                page.resize(len, 0);
                if let Some(connection) = self.connections.get_mut(key) {
                    connection.respond_data(slot, page, len);
                    self.touched.push(key);
                }
            }
            Answer::Reset => {
                let io = std::mem::take(&mut controller.io);
                let held = std::mem::take(&mut controller.event_requests);
                for (_, connection) in io {
                    self.kill(connection);
                }
                for (held, _) in held {
                    self.answer(key, held, NvmeStatus::ABORTED_SQ_DELETION, 0);
                }
                self.answer(key, slot, NvmeStatus::SUCCESS, 0);
            }
            Answer::Abort(held) => {
                self.answer(key, held, NvmeStatus::ABORTED, 0);
                self.answer(key, slot, NvmeStatus::SUCCESS, 0);
            }
            Answer::ShutDown => {
                let volume = crate::bytes::narrow(queue.volume.unwrap_or(u32::MAX).into());
                self.request(volume, SHUTDOWN | u64::from(queue.controller), Request::Flush, Cost::of_command());
                self.answer(key, slot, NvmeStatus::SUCCESS, 0);
            }
        }
        // The log was read, or events were asked for: the next one may go.
        self.events(queue.controller);
    }

    /// Sends an event if there is one and a request for it.
    pub(super) fn events(&mut self, controller: u16) {
        let Some(controller) = self.controllers.get_mut(&controller) else { return };
        if let Some((slot, dw0)) = controller.next_event() {
            let key = controller.admin;
            self.answer(key, slot, NvmeStatus::SUCCESS, dw0);
        }
    }
}

/// Commands of a volume's queues that have not ended.
fn queues_length(connections: &slab::Slab<Box<Connection>>, volume: Option<u32>) -> u64 {
    let queues = connections.iter().filter(|(_, one)| one.queue.is_some_and(|queue| queue.id > 0 && queue.volume == volume));
    crate::bytes::wide(queues.map(|(_, one)| one.executing).sum())
}

/// The volumes of a host, at the address by which it came.
fn discovery_log(shared: &Shared, address: SocketAddr, host: &str) -> Vec<u8> {
    let entries: Vec<DiscoveryEntry> = shared
        .places()
        .iter()
        .filter(|(_, place)| place.spec.admits(host))
        .map(|(id, _)| DiscoveryEntry { subsystem_nqn: nvme::volume_nqn(id), address })
        .collect();
    log_page::discovery(shared.generation(), &entries)
}
