//! What a shard is told, and the ends of connections and volumes.

use super::*;

impl Shard {
    pub(super) fn messages(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            match message {
                Message::Serve { opened, reply } => {
                    self.serve(*opened);
                    let _ = reply.send(());
                }
                Message::Update { spec, reply } => self.update(spec, reply),
                Message::Remove { id, reply } => match self.volume_key(&id) {
                    Some(volume) => {
                        self.cut(volume, |_| false);
                        if let Some(served) = self.volumes.get_mut(volume) {
                            served.drains.push(Drain::Remove(reply));
                        }
                        self.drain(volume);
                    }
                    None => drop(reply.send(())),
                },
                Message::Status { id, reply } => {
                    let status = self.volume_key(&id).and_then(|volume| self.status(volume));
                    let _ = reply.send(status);
                }
                Message::Adopt { connection, slot } => match self.register(connection) {
                    Ok(key) => {
                        self.connect(key, slot);
                        self.touched.push(key);
                    }
                    Err(error) => tracing::warn!(%error, "connection not taken over"),
                },
                Message::DiscoveryChanged => {
                    let told: Vec<u16> = self.controllers.values().filter(|one| one.volume.is_none()).map(|one| one.id).collect();
                    self.tell(told);
                }
                Message::Stop => self.stopping = true,
            }
        }
    }

    fn volume_key(&self, id: &str) -> Option<usize> {
        self.volumes.iter().find(|(_, served)| served.spec.id == id).map(|(key, _)| key)
    }

    fn serve(&mut self, opened: Opened) {
        let Opened { spec, files, folder } = opened;
        let entry = self.volumes.vacant_entry();
        let key = u32::try_from(entry.key()).unwrap_or(u32::MAX);
        let failed = files.as_ref().is_some_and(|files| files.failed);
        let engine = match files {
            Some(files) => Engine::File(Box::new(open_engine(&mut *self.device, key, spec.size_bytes, files))),
            None => Engine::Ram(Ram::new(spec.size_bytes)),
        };
        entry.insert(Served {
            engine,
            qos: Qos::new(spec.limits(), self.now),
            spec,
            folder,
            throttled: VecDeque::new(),
            throttled_since: self.now,
            traffic: Traffic::default(),
            lends: false,
            failure_marked: failed,
            drains: Vec::new(),
        });
    }

    fn update(&mut self, spec: VolumeSpec, reply: Sender<()>) {
        let Some(volume) = self.volume_key(&spec.id) else {
            let _ = reply.send(());
            return;
        };
        self.cut(volume, |host| spec.admits(host));
        let Some(served) = self.volumes.get_mut(volume) else { return };
        let grown = spec.size_bytes > served.spec.size_bytes;
        served.engine.grow(spec.size_bytes);
        if spec.limits() != served.spec.limits() {
            served.qos = Qos::new(spec.limits(), self.now);
        }
        served.spec = spec;
        served.drains.push(Drain::Reply(reply));
        self.drain(volume);
        if grown {
            let key = u32::try_from(volume).ok();
            let told: Vec<u16> = self.controllers.values().filter(|one| one.volume == key).map(|one| one.id).collect();
            self.tell(told);
        }
    }

    /// Tells controllers that what they are about has changed.
    fn tell(&mut self, controllers: Vec<u16>) {
        for id in controllers {
            if let Some(controller) = self.controllers.get_mut(&id) {
                controller.changed();
            }
            self.events(id);
        }
    }

    fn status(&self, volume: usize) -> Option<VolumeStatus> {
        let served = self.volumes.get(volume)?;
        let key = u32::try_from(volume).ok();
        Some(VolumeStatus {
            spec: served.spec.clone(),
            connected: self.controllers.values().any(|controller| controller.volume == key),
            failed: served.engine.has_failed(),
            allocated_bytes: if let Engine::Ram(ram) = &served.engine { ram.allocated() } else { 0 },
            reads: served.traffic.reads.operations,
            writes: served.traffic.writes.operations,
            read_bytes: served.traffic.reads.bytes,
            write_bytes: served.traffic.writes.bytes,
        })
    }

    /// Cuts every controller of a volume off, but for those of hosts to `keep`.
    pub(super) fn cut(&mut self, volume: usize, keep: impl Fn(&str) -> bool) {
        let key = u32::try_from(volume).ok();
        let gone: Vec<usize> = self
            .controllers
            .values()
            .filter(|controller| controller.volume == key && !keep(&controller.host.nqn))
            .map(|controller| controller.admin)
            .collect();
        for admin in gone {
            count(&self.shared.counting.controllers_cut, 1);
            self.kill(admin);
        }
    }

    /// Closes a connection; with an admin queue goes its controller and all of its queues.
    pub(super) fn kill(&mut self, key: usize) {
        let Some(connection) = self.connections.get_mut(key).filter(|connection| !connection.dead) else { return };
        connection.dead = true;
        let _ = epoll::delete(&self.epoll, connection.stream());
        let _ = connection.stream().shutdown(std::net::Shutdown::Both);
        let queue = connection.queue;
        if let Some(served) = queue.and_then(|queue| self.volumes.get_mut(crate::bytes::narrow(queue.volume?.into()))) {
            let before = served.throttled.len();
            served.throttled.retain(|(tag, ..)| untag(*tag).0 != key);
            let dropped = before - served.throttled.len();
            self.throttled -= dropped;
            connection.executing -= dropped.min(connection.executing);
        }
        if connection.executing == 0 {
            self.bury(key);
        }
        let Some(queue) = queue else { return };
        if queue.id > 0 {
            if let Some(controller) = self.controllers.get_mut(&queue.controller) {
                controller.io.retain(|(_, connection)| *connection != key);
            }
        } else if let Some(controller) = self.controllers.remove(&queue.controller) {
            tracing::info!(controller = controller.id, host = controller.host.nqn, "host disconnected");
            for (_, connection) in controller.io {
                self.kill(connection);
            }
        }
    }

    /// Forgets a dead connection whose requests have ended.
    pub(super) fn bury(&mut self, key: usize) {
        let Some(connection) = self.connections.try_remove(key) else { return };
        if let Some(volume) = connection.queue.and_then(|queue| queue.volume) {
            self.drain(crate::bytes::narrow(volume.into()));
        }
    }

    /// Goes on with what waited for a volume's last requests, if they have ended.
    pub(super) fn drain(&mut self, volume: usize) {
        let Some(served) = self.volumes.get_mut(volume) else { return };
        if served.drains.is_empty() || has_zombies(&self.connections, volume) {
            return;
        }
        let idle = served.engine.is_idle();
        for drain in std::mem::take(&mut served.drains) {
            match drain {
                Drain::Connect { connection, slot } => {
                    if self.connections.get(connection).is_some_and(|waiting| waiting.queue.is_none() && !waiting.dead) {
                        self.connect(connection, slot);
                    }
                }
                Drain::Reply(reply) => drop(reply.send(())),
                Drain::Remove(reply) if idle => {
                    if let Some(Served { engine: Engine::File(engine), .. }) = self.volumes.try_remove(volume) {
                        engine.files().into_iter().for_each(|file| self.device.detach(file));
                    }
                    let _ = reply.send(());
                }
                Drain::Remove(reply) => {
                    if let Some(served) = self.volumes.get_mut(volume) {
                        served.drains.push(Drain::Remove(reply));
                    }
                }
            }
        }
    }
}

/// The engine of a volume over its files.
fn open_engine(device: &mut dyn FileDevice, key: u32, size_bytes: u64, files: VolumeFiles) -> Volume {
    let data = device.attach(files.data);
    let clone = files.clone.map(|clone| CloneFiles {
        image: device.attach(clone.image),
        image_bytes: clone.image_bytes,
        present: device.attach(clone.present),
        durable: device.attach(clone.durable),
        marks: clone.marks,
        durable_marks: clone.durable_marks,
    });
    Volume::new(key, size_bytes, data, clone, files.failed)
}
