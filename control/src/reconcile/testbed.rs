//! A region in one thread: the world, the core, and cards that are state
//! machines. Nothing sleeps; what waits, waits in a queue.

use std::collections::BTreeMap;
use std::sync::Arc;

use card_proto::card::{self, Phase, event};

use super::{Core, Input, Object, ObjectKey, Operation, desired};
use crate::auth::Principal;
use crate::error::ApiError;
use crate::model::{BootSource, Card, CardObject, Image, Instance, InstanceState, ObjectKind, PublicIp, REGION, Time, Volume};
use crate::resource::image::{OPERATOR, operator_image_id};
use crate::resource::instance::{describe_instances, run_instances};
use crate::resource::vpc;
use crate::shapes::{self, DescribeInstancesRequest, RunInstancesRequest};
use crate::world::{Call, Region, Tx, World};

pub(crate) const ALICE: &str = "111111111111";
pub(crate) const BOB: &str = "222222222222";

/// A card that does at once what it is told, unless it is told not to.
pub(crate) struct FakeCard {
    pub(crate) hello: card::Hello,
    pub(crate) objects: BTreeMap<ObjectKey, (Option<Object>, u64)>,
    pub(crate) connected: bool,
    /// Machines stay in converging while set.
    pub(crate) slow: bool,
    /// Every Put of this kind is refused.
    pub(crate) refuses: Option<ObjectKind>,
    /// Machines that the guest switched off, with the generation in which it did.
    pub(crate) halted: BTreeMap<String, u64>,
    pub(crate) puts: u64,
    told: BTreeMap<ObjectKey, card::Status>,
}

impl FakeCard {
    pub(crate) fn new(id: &str, zone: &str, number: u8, cores: u32) -> Self {
        let hello = card::Hello {
            card_id: id.into(),
            zone: zone.into(),
            boot_id: 1,
            compute: true,
            storage: true,
            underlay_ipv4: u32::from_be_bytes([10, 255, 0, number]),
            storage_address: format!("127.0.0.1:44{number:02}"),
            initiator_nqn: format!("nqn.2026-11.cardinal:card:{id}"),
            storage_bytes: 1000 << 30,
            cores,
            memory_bytes: u64::from(cores) << 30,
            host_connected: true,
            machine: "sim".into(),
        };
        Self {
            hello,
            objects: BTreeMap::new(),
            connected: false,
            slow: false,
            refuses: None,
            halted: BTreeMap::new(),
            puts: 0,
            told: BTreeMap::new(),
        }
    }

    pub(crate) fn connect(&mut self) -> Vec<Input> {
        self.connected = true;
        self.told.clear();
        let mut inputs = vec![Input::Event(event::Event::Hello(self.hello.clone()))];
        inputs.extend(self.news());
        inputs.push(Input::Event(event::Event::Synced(card::Synced {})));
        inputs
    }

    pub(crate) fn take(&mut self, operation: Operation) -> Vec<Input> {
        let (key, generation) = (operation.key(), operation.generation());
        if self.objects.get(&key).is_some_and(|(_, seen)| generation < *seen) {
            return vec![Input::Outdated(key, generation, "generation".into())];
        }
        let mut inputs = vec![Input::Accepted(key.clone(), generation)];
        match operation {
            Operation::Put(..) if self.refuses == Some(key.0) => return vec![Input::Refused(key, generation, "no".into())],
            Operation::Put(object) => {
                self.puts += 1;
                self.objects.insert(key, (Some(*object), generation));
            }
            Operation::Delete(..) => {
                let known = self.objects.insert(key.clone(), (None, generation)).is_some_and(|(object, _)| object.is_some());
                self.told.remove(&key);
                self.halted.remove(&key.1);
                if known {
                    let gone = card::Gone { kind: number(key.0).into(), id: key.1, generation };
                    inputs.push(Input::Event(event::Event::Gone(gone)));
                }
            }
        }
        inputs.extend(self.news());
        inputs
    }

    pub(crate) fn news(&mut self) -> Vec<Input> {
        let mut news = Vec::new();
        let statuses: Vec<_> = self
            .objects
            .iter()
            .filter_map(|(key, (object, generation))| Some((key.clone(), self.status(key, object.as_ref()?, *generation))))
            .collect();
        for (key, status) in statuses {
            if self.told.get(&key) != Some(&status) {
                self.told.insert(key, status.clone());
                news.push(Input::Event(event::Event::Status(status)));
            }
        }
        news
    }

    fn status(&self, key: &ObjectKey, object: &Object, generation: u64) -> card::Status {
        let phase = match object {
            Object::Instance(machine) if self.halted.get(&key.1) == Some(&generation) => {
                assert_eq!(machine.power(), card::Power::Running);
                Phase::MachineStopped
            }
            Object::Instance(machine) => self.machine_phase(machine),
            _ => Phase::Ready,
        };
        card::Status { kind: number(key.0).into(), id: key.1.clone(), generation, phase: phase.into(), ..Default::default() }
    }

    fn machine_phase(&self, machine: &card::Instance) -> Phase {
        let parts = |kind| self.live(kind).filter(|object| owner(object) == Some(machine.id.as_str())).count();
        let complete = parts(ObjectKind::Port) == machine.ports as usize && parts(ObjectKind::Disk) == machine.disks as usize;
        match machine.power() {
            card::Power::Stopped => Phase::MachineStopped,
            _ if complete && !self.slow => Phase::MachineRunning,
            _ => Phase::Converging,
        }
    }

    pub(crate) fn live(&self, kind: ObjectKind) -> impl Iterator<Item = &Object> {
        self.objects.iter().filter(move |(key, _)| key.0 == kind).filter_map(|(_, (object, _))| object.as_ref())
    }

    pub(crate) fn port(&self, instance_id: &str) -> card::Port {
        self.live(ObjectKind::Port)
            .find_map(|object| match object {
                Object::Port(port) if port.instance_id == instance_id => Some(port.clone()),
                _ => None,
            })
            .unwrap()
    }

    /// The guest switches its machine off.
    pub(crate) fn halt(&mut self, instance_id: &str) {
        let (_, generation) = self.objects[&(ObjectKind::Instance, instance_id.to_owned())];
        self.halted.insert(instance_id.to_owned(), generation);
    }
}

fn owner(object: &Object) -> Option<&str> {
    match object {
        Object::Port(port) => Some(&port.instance_id),
        Object::Disk(disk) => Some(&disk.instance_id),
        _ => None,
    }
}

fn number(kind: ObjectKind) -> card::Kind {
    match kind {
        ObjectKind::Network => card::Kind::Network,
        ObjectKind::Volume => card::Kind::Volume,
        ObjectKind::Disk => card::Kind::Disk,
        ObjectKind::Port => card::Kind::Port,
        ObjectKind::Instance => card::Kind::Instance,
        ObjectKind::NatGateway => card::Kind::NatGateway,
    }
}

/// A region with two accounts.
pub(crate) struct Testbed {
    pub(crate) world: Arc<World>,
    pub(crate) core: Core,
    pub(crate) cards: BTreeMap<String, FakeCard>,
    pub(crate) now: Time,
    inputs: Vec<(String, Input)>,
}

pub(crate) const CARD_A: &str = "card-us-east-1a-1";
pub(crate) const CARD_A2: &str = "card-us-east-1a-2";
pub(crate) const CARD_B: &str = "card-us-east-1b-1";

impl Testbed {
    /// Two cards in the first zone, one in the second, all connected.
    pub(crate) fn new() -> Self {
        Self::on(World::in_memory(Region::for_tests(), 42))
    }

    pub(crate) fn on(world: World) -> Self {
        let mut bed = Self {
            world: Arc::new(world),
            core: Core::default(),
            cards: BTreeMap::new(),
            now: Time(1_700_000_000_000),
            inputs: Vec::new(),
        };
        for (id, zone, number) in [(CARD_A, "us-east-1a", 1), (CARD_A2, "us-east-1a", 2), (CARD_B, "us-east-1b", 3)] {
            bed.cards.insert(id.into(), FakeCard::new(id, zone, number, 8));
        }
        let empty = bed.world.read(|tx| tx.all::<Image>().next().is_none()).0;
        if empty {
            for account in [ALICE, BOB] {
                bed.world.transact(|tx| vpc::default_vpc_insert(tx, bed.world.region(), account, Time(0))).0.unwrap();
            }
            let mut tx = bed.world.begin();
            tx.put(mini());
            tx.commit();
        }
        for id in bed.cards.keys().cloned().collect::<Vec<_>>() {
            bed.connect(&id);
        }
        bed.settle();
        bed
    }

    pub(crate) fn connect(&mut self, card_id: &str) {
        let inputs = self.cards.get_mut(card_id).unwrap().connect();
        self.inputs.extend(inputs.into_iter().map(|input| (card_id.to_owned(), input)));
    }

    pub(crate) fn disconnect(&mut self, card_id: &str) {
        self.cards.get_mut(card_id).unwrap().connected = false;
        self.inputs.push((card_id.to_owned(), Input::Gone));
    }

    /// Lets a card change something, and hears about it.
    pub(crate) fn poke(&mut self, card_id: &str, change: impl FnOnce(&mut FakeCard)) {
        let card = self.cards.get_mut(card_id).unwrap();
        change(card);
        let news = card.news();
        self.inputs.extend(news.into_iter().map(|input| (card_id.to_owned(), input)));
    }

    /// One transaction of the reconciler; what it wants sent is returned.
    pub(crate) fn step(&mut self) -> Vec<(String, Operation)> {
        let dirty = self.world.take_dirty();
        let mut tx = self.world.begin();
        for (card_id, input) in std::mem::take(&mut self.inputs) {
            self.core.input(&mut tx, self.now, &card_id, input);
        }
        let operations = self.core.step(tx, &dirty, self.now, self.world.region()).operations;
        self.assert_complete();
        operations
    }

    /// A step looks only at the cards that it takes to be touched; here all are looked at, and nothing may come out that the rows of
    /// the objects do not say.
    fn assert_complete(&self) {
        self.read(|tx| {
            for card in tx.all::<Card>() {
                let wanted = desired::objects(tx, self.world.region(), &mut desired::Networks::default(), &card.id);
                let wanted: BTreeMap<_, _> = wanted.iter().map(|(key, object)| (key.clone(), object.content_hash())).collect();
                let rows = tx.find::<CardObject>(REGION, "card", &card.id);
                let told: BTreeMap<_, _> = rows.iter().filter_map(|row| Some(((row.kind, row.id.clone()), row.content.clone()?))).collect();
                assert_eq!(told, wanted, "{}", card.id);
            }
        });
    }

    pub(crate) fn deliver(&mut self, operations: Vec<(String, Operation)>) {
        for (card_id, operation) in operations {
            let card = self.cards.get_mut(&card_id).unwrap();
            if card.connected {
                let inputs = card.take(operation);
                self.inputs.extend(inputs.into_iter().map(|input| (card_id.clone(), input)));
            }
        }
    }

    /// Runs until nothing is left to do.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100 {
            let operations = self.step();
            if operations.is_empty() && self.inputs.is_empty() {
                return;
            }
            self.deliver(operations);
        }
        panic!("the region does not come to rest");
    }

    pub(crate) fn call<T>(&self, account: &str, action: impl FnOnce(&mut Call<'_>) -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.world.call(&Principal::for_test(account), self.now, action).0
    }

    pub(crate) fn code<T>(&self, account: &str, action: impl FnOnce(&mut Call<'_>) -> Result<T, ApiError>) -> String {
        self.call(account, action).err().expect("refused").code.into_owned()
    }

    pub(crate) fn read<T>(&self, action: impl FnOnce(&Tx<'_>) -> T) -> T {
        self.world.read(action).0
    }

    /// A launch of Alice's that succeeds.
    pub(crate) fn launch(&self, request: RunInstancesRequest) -> Vec<shapes::Instance> {
        self.call(ALICE, |call| run_instances(call, request)).unwrap().instances
    }

    /// One running instance of Alice's in the first zone.
    pub(crate) fn running(&mut self) -> String {
        let id = self.launch(request("us-east-1a"))[0].instance_id.clone().unwrap();
        self.settle();
        assert_eq!(self.state(&id), InstanceState::Running);
        id
    }

    pub(crate) fn row(&self, id: &str) -> Instance {
        self.read(|tx| Instance::clone(&tx.get::<Instance>(ALICE, id).unwrap()))
    }

    pub(crate) fn state(&self, id: &str) -> InstanceState {
        self.row(id).state
    }

    pub(crate) fn card_of(&self, id: &str) -> String {
        self.row(id).placement.unwrap().card_id
    }

    pub(crate) fn shape(&self, id: &str) -> shapes::Instance {
        let request = DescribeInstancesRequest { instance_ids: vec![id.to_owned()], ..Default::default() };
        let mut answer = self.call(ALICE, |call| describe_instances(call, request)).unwrap();
        answer.reservations.remove(0).instances.remove(0)
    }

    pub(crate) fn volumes(&self) -> Vec<Arc<Volume>> {
        self.read(|tx| tx.list::<Volume>(ALICE).cloned().collect())
    }

    /// Nothing that belongs to an instance is left, anywhere.
    pub(crate) fn assert_no_residue(&self) {
        self.read(|tx| {
            for card in self.cards.keys() {
                assert_eq!(tx.sum::<Instance>("vcpus", card), 0);
                assert_eq!(tx.sum::<Volume>("gib", card), 0);
            }
            assert_eq!(tx.all::<Volume>().count(), 0);
            assert_eq!(tx.all::<crate::model::NetworkInterface>().count(), 0);
            assert_eq!(tx.list::<PublicIp>(REGION).count(), 0);
            assert_eq!(tx.all::<CardObject>().count(), 0);
        });
        for card in self.cards.values() {
            assert!(card.objects.values().all(|(object, _)| object.is_none()), "{:?}", card.objects);
        }
    }
}

fn mini() -> Image {
    Image {
        account_id: OPERATOR.into(),
        id: operator_image_id("mini"),
        name: "mini".into(),
        description: String::new(),
        owner_alias: Some("amazon".into()),
        public: true,
        object: "mini.raw".into(),
        size_bytes: 300 << 20,
        architecture: "x86_64".into(),
        platform: "Linux".into(),
        root_device_name: "/dev/xvda".into(),
        user: Some("ec2-user".into()),
        boot: Some(BootSource { kernel: "mini.vmlinux".into(), initrd: String::new(), command_line: "root=/dev/vda".into() }),
        created: Time(0),
    }
}

/// One t3.micro of the image in a zone.
pub(crate) fn request(zone: &str) -> RunInstancesRequest {
    RunInstancesRequest {
        image_id: Some(operator_image_id("mini")),
        instance_type: Some("t3.micro".into()),
        min_count: Some(1),
        max_count: Some(1),
        placement: Some(shapes::Placement { availability_zone: Some(zone.into()), ..Default::default() }),
        ..Default::default()
    }
}

/// Numbers below what is asked for, the same for the same seed.
pub(crate) fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut random = crate::world::Entropy::Seeded(seed);
    move |below| {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        usize::try_from(u64::from_le_bytes(bytes) % u64::try_from(below).unwrap()).unwrap()
    }
}
