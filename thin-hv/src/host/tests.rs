use super::*;
use crate::machine::sim::Sim;
use card_proto::host::{Block, Function, Hello, function::Kind};
use proptest::prelude::*;

const CORES: u32 = 4;
const MEMORY: u64 = 1 << 30;

/// A host on simulated machines, its card and its clock.
struct Bench {
    folder: tempfile::TempDir,
    host: Option<Host>,
    events: mpsc::Receiver<(Source, Event)>,
    now: Instant,
    seen: BTreeMap<String, MachineStatus>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let (host, events) = host(folder.path(), now);
        let mut bench = Self { folder, host: Some(host), events, now, seen: BTreeMap::new() };
        bench.send(Command::Hello(Hello::default()));
        bench
    }

    fn restart(&mut self) {
        // The old one lets go of the folder first.
        self.host = None;
        let (host, events) = host(self.folder.path(), self.now);
        (self.host, self.events) = (Some(host), events);
        self.seen.clear();
        self.send(Command::Hello(Hello::default()));
    }

    fn host(&mut self) -> &mut Host {
        self.host.as_mut().unwrap()
    }

    fn send(&mut self, command: Command) {
        let now = self.now;
        self.host().command(ToHost { command: Some(command) }, now);
        self.note();
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Ok((source, event)) = self.events.try_recv() else { return };
            let now = self.now;
            self.host().event(&source, event, now);
            self.note();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        self.host().tick(now);
        self.note();
    }

    fn note(&mut self) {
        while let Some(report) = self.host().report() {
            if let Some(Report::Status(status)) = report.report {
                self.seen.insert(status.id.clone(), status);
            }
        }
        self.check();
    }

    /// What holds after every step.
    fn check(&mut self) {
        let host = self.host();
        let cores: Vec<u32> = host.guests.values().filter_map(|guest| guest.live.as_ref()).flat_map(|live| live.cores.clone()).collect();
        assert_eq!(cores.iter().collect::<BTreeSet<_>>().len(), cores.len(), "a core with two owners");
        assert_eq!(host.ledger.cores_free() as usize, CORES as usize - cores.len());
        for (id, guest) in &host.guests {
            assert_eq!(host.records.load(id), Some(guest.saved.clone()));
        }
    }

    fn phase(&self, id: &str) -> MachinePhase {
        self.seen.get(id).map_or(MachinePhase::Unspecified, MachineStatus::phase)
    }
}

fn host(folder: &std::path::Path, now: Instant) -> (Host, mpsc::Receiver<(Source, Event)>) {
    let (events, received) = mpsc::channel();
    let parts = Parts {
        vmm: Box::new(Sim),
        ledger: Ledger::new(CORES, MEMORY),
        records: Records::open(folder, "sim").unwrap(),
        link_dir: "/link".into(),
        simulated: true,
        boot_id: 7,
        events,
    };
    (Host::new(parts, now), received)
}

fn machine(id: &str, generation: u64, running: bool) -> MachineMessage {
    MachineMessage { id: id.into(), generation, running, vcpus: 1, memory_bytes: 64 << 20, ..Default::default() }
}

#[test]
fn an_invalid_machine_is_refused_with_the_field() {
    let mut bench = Bench::new();
    bench.send(Command::Put(MachineMessage { vcpus: 0, ..machine("i-1", 1, true) }));
    assert_eq!(bench.phase("i-1"), MachinePhase::Failed);
    assert_eq!(bench.seen["i-1"].message, "invalid vcpus: is 1 to 255");
    bench.send(Command::Put(machine("../../etc", 1, true)));
    assert_eq!(bench.seen[""].message, "invalid id: is 1 to 64 of A-Z a-z 0-9 - _ . and begins with a letter");
    assert!(bench.host().records.ids().unwrap().is_empty());
}

#[test]
fn nothing_is_reported_before_hello_and_all_of_it_after() {
    let mut bench = Bench::new();
    bench.host().link_lost();
    bench.send(Command::Put(machine("i-1", 1, true)));
    bench.deliver(9);
    assert!(bench.seen.is_empty());
    bench.host().hello();
    let reports: Vec<Report> = std::iter::from_fn(|| bench.host().report()).filter_map(|report| report.report).collect();
    let [Report::Inventory(inventory), Report::Status(status), Report::Synced(_), Report::Console(console)] = &reports[..] else {
        panic!("{reports:?}")
    };
    assert_eq!((inventory.cores, inventory.cores_free), (CORES, CORES - 1));
    assert_eq!((status.phase(), status.generation), (MachinePhase::Running, 1));
    assert!(console.data.starts_with(b"i-1: simulated machine"));
}

#[test]
fn a_late_event_of_an_earlier_run_is_ignored() {
    let mut bench = Bench::new();
    bench.send(Command::Put(machine("i-1", 1, true)));
    bench.deliver(9);
    let now = bench.now;
    bench.host().event(&Source { id: "i-1".into(), run: 99 }, Event::Exited("late".into()), now);
    assert_eq!(bench.host().ledger.cores_free(), CORES - 1);
}

#[test]
fn an_unplug_that_is_not_answered_is_asked_again() {
    let mut bench = Bench::new();
    bench.send(Command::Put(machine("i-1", 1, true)));
    bench.deliver(9);
    let kind = Some(Kind::Block(Block::default()));
    let function = Function { id: "vol-1".into(), socket: "vol-1.sock".into(), kind };
    bench.send(Command::Put(MachineMessage { functions: vec![function], ..machine("i-1", 2, true) }));
    // The answer is lost.
    assert_eq!(bench.events.try_recv().unwrap().1, Event::Plugged("vol-1".into()));
    assert!(bench.host().deadline().is_some());
    bench.pass(FUNCTION_INTERVAL);
    bench.deliver(9);
    assert_eq!(bench.seen["i-1"].functions, ["vol-1"]);
    assert_eq!(bench.host().deadline(), None);
}

#[test]
fn a_guest_that_went_off_on_an_overtaken_request_is_started_again() {
    let mut bench = Bench::new();
    bench.send(Command::Put(machine("i-1", 1, true)));
    bench.deliver(9);
    bench.send(Command::Put(machine("i-1", 2, false)));
    bench.send(Command::Put(machine("i-1", 3, true)));
    bench.deliver(9);
    assert_eq!((bench.phase("i-1"), bench.seen["i-1"].generation), (MachinePhase::Running, 3));
    assert_eq!(bench.host().runs, 2);
}

#[derive(Clone, Debug)]
enum Step {
    Put { id: u8, ahead: i8, running: bool, boot: u64, vcpus: u32, functions: u8 },
    Delete { id: u8, ahead: i8 },
    Deliver(usize),
    Pass(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_u8, -1..3_i8, any::<bool>(), 0..3_u64, 1..4_u32, 0..4_u8)
            .prop_map(|(id, ahead, running, boot, vcpus, functions)| Step::Put { id, ahead, running, boot, vcpus, functions }),
        1 => (0..4_u8, -1..2_i8).prop_map(|(id, ahead)| Step::Delete { id, ahead }),
        4 => (1..4_usize).prop_map(Step::Deliver),
        1 => (0..30_000_u64).prop_map(Step::Pass),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_history_ends_where_the_card_wants_it(steps in proptest::collection::vec(step(), 1..60)) {
        let mut bench = Bench::new();
        let mut newest: BTreeMap<String, MachineMessage> = BTreeMap::new();
        let mut generation = 10_u64;
        for step in steps {
            match step {
                Step::Put { id, ahead, running, boot, vcpus, functions } => {
                    generation = generation.saturating_add_signed(ahead.into());
                    let id = format!("i-{id}");
                    let functions = (0..functions).map(|index| Function {
                        id: format!("vol-{index}"), socket: "s".into(), kind: Some(Kind::Block(Block::default())),
                    }).collect();
                    let put = MachineMessage { boot, vcpus, functions, ..machine(&id, generation, running) };
                    if newest.get(&id).is_none_or(|known| known.generation < generation) {
                        newest.insert(id, put.clone());
                    }
                    bench.send(Command::Put(put));
                }
                Step::Delete { id, ahead } => {
                    generation = generation.saturating_add_signed(ahead.into());
                    let id = format!("i-{id}");
                    if newest.get(&id).is_none_or(|known| known.generation <= generation) {
                        newest.remove(&id);
                        bench.send(Command::Delete(Delete { id, generation }));
                        bench.deliver(usize::MAX);
                    }
                }
                Step::Deliver(count) => bench.deliver(count),
                Step::Pass(ms) => bench.pass(Duration::from_millis(ms)),
                Step::Restart => bench.restart(),
            }
        }
        // The card asks again for what it wants, as after a reconnection, in a higher generation.
        let wanted: Vec<MachineMessage> = newest.into_values().collect();
        for (index, put) in wanted.iter().enumerate() {
            bench.send(Command::Put(MachineMessage { generation: generation + 100 + index as u64, ..put.clone() }));
            bench.deliver(usize::MAX);
            bench.pass(Duration::from_secs(30));
            bench.deliver(usize::MAX);
        }
        for put in &wanted {
            let status = &bench.seen[&put.id];
            match status.phase() {
                MachinePhase::Running => {
                    prop_assert!(put.running && put.boot <= status.boot);
                    prop_assert_eq!(status.functions.len(), put.functions.len());
                }
                MachinePhase::Stopped => prop_assert!(!put.running),
                MachinePhase::Failed => prop_assert!(put.running && status.message.starts_with("insufficient cores")),
                other => prop_assert!(false, "{:?} {:?}", other, status),
            }
        }
        prop_assert_eq!(bench.host().guests.len(), wanted.len());
    }
}
