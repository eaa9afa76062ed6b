//! Connect: who may have a queue, and what it becomes part of. NVMe over Fabrics 1.1 section 3.3.

use super::*;

impl Shard {
    /// Executes the Connect of a new connection.
    pub(super) fn connect(&mut self, key: usize, slot: usize) {
        let Some(command) = self.connections.get_mut(key).and_then(|connection| connection.command_mut(slot)) else {
            return;
        };
        let sqe = command.sqe;
        let data = match ConnectData::decode(command.buffer.get(..command.len).unwrap_or_default()) {
            Ok(data) => data,
            Err(at) => return self.refuse(key, slot, Refusal::data(at)),
        };
        if sqe.u16_at(40) != 0 {
            return self.refuse(key, slot, Refusal::because(NvmeStatus::CONNECT_FORMAT));
        }
        let (id, entries) = (sqe.u16_at(42), sqe.u16_at(44));
        if entries == 0 || entries >= MAX_QUEUE {
            return self.refuse(key, slot, Refusal::entry(44));
        }
        let size = entries + 1;
        let volume = if data.subsystem_nqn == DISCOVERY_NQN {
            None
        } else {
            let place = nvme::volume_of_nqn(&data.subsystem_nqn).and_then(|id| self.shared.places().get(id).cloned());
            let Some(place) = place else { return self.refuse(key, slot, Refusal::data(ConnectData::SUBSYSTEM_AT)) };
            if place.shard != self.index {
                return self.hand_over(key, slot, place.shard);
            }
            let found = self.volumes.iter().find(|(_, served)| nvme::volume_nqn(&served.spec.id) == data.subsystem_nqn);
            let Some((volume, served)) = found else {
                return self.refuse(key, slot, Refusal::data(ConnectData::SUBSYSTEM_AT));
            };
            if !served.spec.admits(&data.host_nqn) {
                tracing::warn!(volume = served.spec.id, host = data.host_nqn, "host refused");
                count(&self.shared.counting.hosts_refused, 1);
                return self.refuse(key, slot, Refusal::because(NvmeStatus::CONNECT_HOST));
            }
            Some(volume)
        };
        let host = Host { nqn: data.host_nqn, id: data.host_id };
        let volume_key = volume.map(|volume| u32::try_from(volume).unwrap_or(u32::MAX));
        let flow_control_off = sqe.dword(11) >> 16 & 1 << 2 != 0;
        let in_place = volume
            .and_then(|volume| self.volumes.get(volume))
            .is_some_and(|served| matches!(served.engine, Engine::Ram(_)) && served.qos.is_unlimited());
        let queue = |controller| Queue::new(controller, volume_key, id, size, flow_control_off).in_place(in_place);
        if id > 0 {
            return match self.connect_io(key, id, &data.controller, volume_key, &host) {
                Ok(()) => self.connected(key, slot, queue(data.controller)),
                Err(refusal) => self.refuse(key, slot, refusal),
            };
        }
        if data.controller != 0xffff {
            return self.refuse(key, slot, Refusal::data(ConnectData::CONTROLLER_AT));
        }
        let exclusive = |served: &Served| served.spec.access == Access::Exclusive;
        if let Some(volume) = volume.filter(|volume| self.volumes.get(*volume).is_some_and(exclusive)) {
            self.cut(volume, |_| false);
            if let Some(served) = self.volumes.get_mut(volume)
                && has_zombies(&self.connections, volume)
            {
                served.drains.push(Drain::Connect { connection: key, slot });
                return;
            }
        }
        let keep_alive = Duration::from_millis(sqe.dword(12).into());
        let Some(controller) = self.controller_id() else {
            return self.refuse(key, slot, Refusal::because(NvmeStatus::CONNECT_BUSY));
        };
        let new = Controller::new(controller, volume_key, host, key, keep_alive, self.now);
        tracing::info!(controller, subsystem = data.subsystem_nqn, host = new.host.nqn, "host connected");
        self.controllers.insert(controller, new);
        self.connected(key, slot, queue(controller));
    }

    fn connect_io(&mut self, key: usize, id: u16, controller: &u16, volume: Option<u32>, host: &Host) -> Result<(), Refusal> {
        let Some(controller) = self.controllers.get_mut(controller).filter(|found| found.volume == volume) else {
            return Err(Refusal::data(ConnectData::CONTROLLER_AT));
        };
        if volume.is_none() || id > MAX_IO_QUEUES {
            return Err(Refusal::entry(42));
        }
        if controller.host != *host {
            count(&self.shared.counting.hosts_refused, 1);
            return Err(Refusal::because(NvmeStatus::CONNECT_HOST));
        }
        if !controller.is_enabled() || controller.io.iter().any(|(used, _)| *used == id) {
            return Err(Refusal::because(NvmeStatus::SEQUENCE));
        }
        controller.io.push((id, key));
        controller.seen(self.now);
        Ok(())
    }

    fn connected(&mut self, key: usize, slot: usize, queue: Queue) {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.queue = Some(queue);
        }
        self.answer(key, slot, NvmeStatus::SUCCESS, queue.controller.into());
    }

    fn refuse(&mut self, key: usize, slot: usize, refusal: Refusal) {
        count(&self.shared.counting.connects_refused, 1);
        let busy = refusal.status == NvmeStatus::CONNECT_BUSY;
        self.answer(key, slot, if busy { refusal.status } else { refusal.status.dnr() }, refusal.dw0);
        if let Some(connection) = self.connections.get_mut(key) {
            connection.close_soon(self.now);
        }
    }

    fn hand_over(&mut self, key: usize, slot: usize, shard: usize) {
        let Some(connection) = self.connections.try_remove(key) else { return };
        let _ = epoll::delete(&self.epoll, connection.stream());
        self.shared.send(shard, Message::Adopt { connection, slot });
    }

    /// An identifier that no controller has, going round so that an old one is not soon used again.
    fn controller_id(&mut self) -> Option<u16> {
        for _ in 0..0xfff0_u16 {
            let id = self.next_controller;
            self.next_controller = if id >= 0xffef { 1 } else { id + 1 };
            if !self.controllers.contains_key(&id) {
                return Some(id);
            }
        }
        None
    }
}

/// Why a Connect is refused: a status, and for bad parameters where they stand.
struct Refusal {
    status: NvmeStatus,
    dw0: u64,
}

impl Refusal {
    fn because(status: NvmeStatus) -> Self {
        Self { status, dw0: 0 }
    }

    /// A field of the Connect data.
    fn data(at: u16) -> Self {
        Self { status: NvmeStatus::CONNECT_INVALID, dw0: u64::from(at) | 1 << 16 }
    }

    /// A field of the submission queue entry.
    fn entry(at: u16) -> Self {
        Self { status: NvmeStatus::CONNECT_INVALID, dw0: at.into() }
    }
}
