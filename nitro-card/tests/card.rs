//! The daemon from outside: real gRPC with certificates, a real mailbox with a
//! host of this test at its other end, a real storage target and packet path.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a test

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use card_proto::card::card_client::CardClient;
use card_proto::card::packets_client::PacketsClient;
use card_proto::card::{
    self, ConsoleInput, ConsoleOutputRequest, DeleteRequest, Kind, Phase, PutRequest, Status, WatchRequest, event, put_request,
};
use card_proto::host::{
    ConsoleOutput, Inventory, Machine, MachinePhase, MachineStatus, Synced, ToCard, ToHost, to_card::Report, to_host::Command,
};
use card_proto::mailbox;
use nitro_card::settings::Settings;
use nitro_card::start;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

const CARD: &str = "card-us-east-1a-1";

/// Certificates of a region.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    /// Certificate and key for some DNS names.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn pem(&self) -> String {
        self.issuer.pem()
    }
}

/// A card in this process.
struct Rig {
    folder: tempfile::TempDir,
    authority: Authority,
    address: SocketAddr,
    metrics: SocketAddr,
    storage: SocketAddr,
    running: Option<(oneshot::Sender<()>, JoinHandle<anyhow::Result<()>>)>,
}

impl Rig {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let (certificate, key) = authority.issue(&[CARD]);
        for (name, text) in [("ca.pem", authority.pem()), ("card.pem", certificate), ("card.key", key)] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        std::fs::create_dir(folder.path().join("images")).unwrap();
        std::fs::write(folder.path().join("images/mini.vmlinux"), b"a kernel").unwrap();
        std::fs::write(folder.path().join("images/mini.raw"), vec![7; 1 << 20]).unwrap();
        let mut rig = Self { folder, authority, address: free_port(), metrics: free_port(), storage: free_port(), running: None };
        rig.run().await;
        rig
    }

    async fn run(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let text = format!(
            r#"
            id = "{CARD}"
            zone = "us-east-1a"
            state_dir = {:?}
            link_dir = {:?}
            images_dir = {:?}
            listen = "{}"
            metrics_listen = "{}"
            roles = ["compute", "storage"]
            [tls]
            authority = {:?}
            certificate = {:?}
            key = {:?}
            [storage]
            listen = "{}"
            capacity_bytes = 1073741824
            "#,
            path("state"),
            path("link"),
            path("images"),
            self.address,
            self.metrics,
            path("ca.pem"),
            path("card.pem"),
            path("card.key"),
            self.storage,
        );
        std::fs::write(path("card.toml"), text).unwrap();
        let settings = Settings::load(&path("card.toml")).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(start::run(settings, async { drop(stopped.await) }));
        self.running = Some((stop, task));
        for _ in 0..500 {
            if TcpStream::connect(self.address).is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (_, task) = self.running.take().unwrap();
        panic!("the card does not start: {:?}", task.await);
    }

    async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(20), task).await.expect("the card stops").unwrap().unwrap();
    }

    async fn connect(&self, names: Option<&[&str]>) -> Result<CardClient<Channel>, tonic::transport::Error> {
        self.channel(names).await.map(CardClient::new)
    }

    async fn channel(&self, names: Option<&[&str]>) -> Result<Channel, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.authority.pem())).domain_name(CARD);
        if let Some(names) = names {
            let (certificate, key) = self.authority.issue(names);
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let endpoint = Channel::from_shared(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls)?.connect().await
    }

    async fn control(&self) -> Control {
        let mut client = self.connect(Some(&["control"])).await.unwrap();
        let mut stream = client.watch(WatchRequest { epoch: 1 }).await.unwrap().into_inner();
        let statuses = Arc::new(Mutex::new(Seen::default()));
        let seen = statuses.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = stream.message().await {
                let mut seen = seen.lock().unwrap();
                match message.event.unwrap() {
                    event::Event::Hello(hello) => seen.hello = hello,
                    event::Event::Status(status) => drop(seen.statuses.insert((status.kind, status.id.clone()), status)),
                    event::Event::Gone(gone) => {
                        seen.statuses.remove(&(gone.kind, gone.id.clone()));
                        seen.gone.push((gone.kind, gone.id, gone.generation));
                    }
                    event::Event::Synced(_) => seen.synced = true,
                }
            }
        });
        Control { client, seen: statuses }
    }

    fn link(&self) -> PathBuf {
        self.folder.path().join("link")
    }
}

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[derive(Default)]
struct Seen {
    hello: card::Hello,
    statuses: BTreeMap<(i32, String), Status>,
    gone: Vec<(i32, String, u64)>,
    synced: bool,
}

struct Control {
    client: CardClient<Channel>,
    seen: Arc<Mutex<Seen>>,
}

impl Control {
    async fn put(&mut self, object: put_request::Object) {
        self.client.put(PutRequest { epoch: 1, object: Some(object) }).await.unwrap();
    }

    async fn delete(&mut self, kind: Kind, id: &str, generation: u64) {
        self.client.delete(DeleteRequest { epoch: 1, kind: kind.into(), id: id.into(), generation }).await.unwrap();
    }

    async fn until(&self, what: &str, holds: impl Fn(&Seen) -> bool) {
        for _ in 0..1000 {
            if holds(&self.seen.lock().unwrap()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never: {what}; {:?} {:?}", self.seen.lock().unwrap().statuses, self.seen.lock().unwrap().gone);
    }

    async fn until_phase(&self, kind: Kind, id: &str, phase: Phase) -> Status {
        let key = (i32::from(kind), id.to_owned());
        self.until(&format!("{id} {phase:?}"), |seen| seen.statuses.get(&key).is_some_and(|status| status.phase() == phase)).await;
        self.seen.lock().unwrap().statuses[&key].clone()
    }
}

/// A host that does at once what it is told, in a thread until its link ends.
fn host(link: &Path, machines: Arc<Mutex<BTreeMap<String, Machine>>>) -> std::thread::JoinHandle<()> {
    let socket = link.join("slot.sock");
    std::thread::spawn(move || {
        let (mut sender, mut receiver) = mailbox::connect(&socket).unwrap().split();
        let mut send = |report| drop(sender.send(&ToCard { report: Some(report) }));
        let status = |machine: &Machine| {
            let phase = if machine.running { MachinePhase::Running } else { MachinePhase::Stopped };
            let functions = machine.functions.iter().map(|function| function.id.clone()).collect();
            Report::Status(MachineStatus {
                id: machine.id.clone(),
                generation: machine.generation,
                boot: machine.boot,
                phase: phase.into(),
                functions,
                ..MachineStatus::default()
            })
        };
        while let Ok(Some(ToHost { command: Some(command) })) = receiver.recv(None) {
            let mut machines = machines.lock().unwrap();
            match command {
                Command::Hello(_) => {
                    send(Report::Inventory(Inventory { cores: 8, memory_bytes: 16 << 30, machine: "test".into(), ..Inventory::default() }));
                    machines.values().for_each(|machine| send(status(machine)));
                    send(Report::Synced(Synced {}));
                }
                Command::Put(machine) => {
                    send(status(&machine));
                    send(Report::Console(ConsoleOutput { id: machine.id.clone(), data: b"login: ".to_vec() }));
                    machines.insert(machine.id.clone(), machine);
                }
                Command::Delete(delete) => {
                    machines.remove(&delete.id);
                    let phase = MachinePhase::Gone.into();
                    send(Report::Status(MachineStatus { id: delete.id, generation: delete.generation, phase, ..MachineStatus::default() }));
                }
                Command::Console(input) => send(Report::Console(ConsoleOutput { id: input.id, data: input.data })),
            }
        }
    })
}

fn instance(generation: u64) -> card::Instance {
    card::Instance {
        id: "i-1".into(),
        generation,
        power: card::Power::Running.into(),
        vcpus: 1,
        memory_bytes: 1 << 30,
        boot_source: Some(card::BootSource { kernel: "mini.vmlinux".into(), command_line: "quiet".into(), ..card::BootSource::default() }),
        metadata: Some(card::Metadata {
            instance_type: "t3.micro".into(),
            options: Some(card::MetadataOptions { enabled: true, tokens_required: true, hop_limit: 1, tags_enabled: false }),
            ..card::Metadata::default()
        }),
        ports: 1,
        disks: 1,
        ..card::Instance::default()
    }
}

fn port() -> card::Port {
    card::Port {
        id: "eni-1".into(),
        generation: 1,
        instance_id: "i-1".into(),
        vni: 7,
        mac: vec![2, 0, 0, 0, 0, 1],
        private_ipv4: 0x0a00_0005,
        subnet: Some(card::Prefix { address: 0x0a00_0000, length: 24 }),
        mtu: 1500,
        ..card::Port::default()
    }
}

async fn launch(control: &mut Control) {
    let volume = card::Volume {
        id: "vol-0123456789abcdef0".into(),
        generation: 1,
        size_bytes: 2 << 20,
        image: "mini.raw".into(),
        initiator_nqn: format!("nqn.2026-11.cardinal:card:{CARD}"),
        ..card::Volume::default()
    };
    control.put(put_request::Object::Volume(volume)).await;
    let nqn = control.until_phase(Kind::Volume, "vol-0123456789abcdef0", Phase::Ready).await.nqn;
    let disk = card::Disk {
        id: "vol-0123456789abcdef0".into(),
        generation: 1,
        instance_id: "i-1".into(),
        device_name: "/dev/xvda".into(),
        boot: true,
        nqn,
        address: control.seen.lock().unwrap().hello.storage_address.clone(),
        size_bytes: 2 << 20,
        ..card::Disk::default()
    };
    control.put(put_request::Object::Disk(disk)).await;
    control.put(put_request::Object::Port(port())).await;
    control.put(put_request::Object::Instance(instance(1))).await;
    control.until_phase(Kind::Instance, "i-1", Phase::MachineRunning).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_launched_outlives_the_card_and_leaves_nothing() {
    let mut rig = Rig::start().await;
    let machines = Arc::default();
    let first = host(&rig.link(), Arc::clone(&machines));
    let mut control = rig.control().await;
    control.until("the host is told of", |seen| seen.hello.host_connected && seen.hello.cores == 8 && seen.synced).await;
    launch(&mut control).await;
    control.until_phase(Kind::Port, "eni-1", Phase::Ready).await;
    control.until_phase(Kind::Disk, "vol-0123456789abcdef0", Phase::Ready).await;
    let machine: Machine = machines.lock().unwrap().get("i-1").cloned().unwrap();
    assert_eq!(machine.smbios.unwrap().asset_tag, "i-1");
    assert_eq!(std::fs::read(rig.link().join(machine.kernel)).unwrap(), b"a kernel");
    // Its machine starts: the card finds the sockets of its functions.
    let sockets = ["eni-1.sock", "vol-0123456789abcdef0.sock"].map(|name| UnixListener::bind(rig.link().join(name)).unwrap());
    let connections: Vec<_> = sockets.iter().map(|socket| socket.accept().unwrap().0).collect();

    // Console: what was printed, and live both ways.
    let output = control.client.console_output(ConsoleOutputRequest { instance_id: "i-1".into() }).await.unwrap().into_inner();
    assert_eq!(output.output, b"login: ");
    let typed = tokio_stream::iter([ConsoleInput { instance_id: "i-1".into(), data: b"root\n".to_vec() }]);
    let mut live = control.client.console(typed).await.unwrap().into_inner();
    assert_eq!(live.message().await.unwrap().unwrap().data, b"root\n");

    // The card stops and starts again: the machine is not touched.
    rig.stop().await;
    first.join().unwrap();
    let before = machines.lock().unwrap().get("i-1").cloned().unwrap();
    rig.run().await;
    // And the card that comes back finds them again.
    drop(connections);
    let _connections: Vec<_> = sockets.iter().map(|socket| socket.accept().unwrap().0).collect();
    let _second = host(&rig.link(), Arc::clone(&machines));
    let mut control = rig.control().await;
    control.until_phase(Kind::Instance, "i-1", Phase::MachineRunning).await;
    control.until_phase(Kind::Disk, "vol-0123456789abcdef0", Phase::Ready).await;
    assert_eq!(machines.lock().unwrap().get("i-1").unwrap().functions, before.functions);
    let output = control.client.console_output(ConsoleOutputRequest { instance_id: "i-1".into() }).await.unwrap().into_inner();
    assert!(output.output.starts_with(b"login: root\n"), "{:?}", String::from_utf8_lossy(&output.output));

    // Fencing.
    let stale = PutRequest { epoch: 1, object: Some(put_request::Object::Instance(instance(0))) };
    assert_eq!(control.client.put(stale).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    let superseded = PutRequest { epoch: 0, object: Some(put_request::Object::Instance(instance(9))) };
    assert_eq!(control.client.put(superseded).await.unwrap_err().code(), tonic::Code::FailedPrecondition);

    // Terminate. The machine is killed and leaves its sockets behind.
    control.delete(Kind::Instance, "i-1", 2).await;
    control.delete(Kind::Port, "eni-1", 2).await;
    control.delete(Kind::Disk, "vol-0123456789abcdef0", 2).await;
    control.until("the disk is gone", |seen| seen.gone.contains(&(Kind::Disk.into(), "vol-0123456789abcdef0".into(), 2))).await;
    control.delete(Kind::Volume, "vol-0123456789abcdef0", 2).await;
    control.until("all four are gone", |seen| seen.gone.len() == 4).await;
    assert!(machines.lock().unwrap().is_empty());
    let left: Vec<_> = std::fs::read_dir(rig.link()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["slot.sock"]);
    assert_eq!(std::fs::read_dir(rig.folder.path().join("state/console")).unwrap().count(), 0);
    control.delete(Kind::Instance, "i-unknown", 1).await;
    control.until("unknown is gone", |seen| seen.gone.contains(&(Kind::Instance.into(), "i-unknown".into(), 1))).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_control_is_heard_and_garbage_disturbs_nobody() {
    let mut rig = Rig::start().await;
    // Without a certificate the handshake fails, at the latest at the first call.
    if let Ok(mut nobody) = rig.connect(None).await {
        nobody.watch(WatchRequest { epoch: 1 }).await.unwrap_err();
    }
    for names in [&[CARD][..], &["control", CARD], &["control.example"], &[]] {
        let mut other = rig.connect(Some(names)).await.unwrap();
        assert_eq!(other.watch(WatchRequest { epoch: 1 }).await.unwrap_err().code(), tonic::Code::PermissionDenied, "{names:?}");
    }
    for round in 0..200_u32 {
        let mut stream = TcpStream::connect(rig.address).unwrap();
        let garbage: Vec<u8> =
            (0..200).map(|byte: u32| (byte.wrapping_mul(round).wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
        let _ = stream.write_all(&garbage);
    }
    let mut control = rig.control().await;
    let large = card::Volume { id: "vol-1".into(), image: "x".repeat(5 << 20), ..card::Volume::default() };
    let refused = control.client.put(PutRequest { epoch: 1, object: Some(put_request::Object::Volume(large)) }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::OutOfRange, "{refused}");
    for (object, code) in [
        (None, tonic::Code::InvalidArgument),
        (Some(put_request::Object::Port(card::Port { mtu: 1, ..port() })), tonic::Code::InvalidArgument),
        (Some(put_request::Object::Volume(card::Volume { id: "../x".into(), ..card::Volume::default() })), tonic::Code::InvalidArgument),
    ] {
        assert_eq!(control.client.put(PutRequest { epoch: 1, object }).await.unwrap_err().code(), code);
    }
    control.put(put_request::Object::Port(port())).await;
    control.until_phase(Kind::Port, "eni-1", Phase::Ready).await;

    let page = |path: &str| {
        let mut stream = TcpStream::connect(rig.metrics).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    assert!(page("/healthz").starts_with("HTTP/1.1 200 OK"));
    let metrics = page("/metrics");
    for line in [
        "card_objects{kind=\"port\"} 1",
        "card_host_connected 0",
        "dataplane_drops_total{reason=",
        "storage_events_total{event=",
        "dataplane_packets_total{device=\"eni-1\"",
        "dataplane_device_events_total{device=\"eni-1\",kind=\"vhost\"",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    assert!(page("/other").starts_with("HTTP/1.1 404"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_look_into_the_packet_path_and_change_nothing() {
    let mut rig = Rig::start().await;
    let mut control = rig.control().await;
    let group = card::rule::Remote::GroupId("sg-9".into());
    let web = card::Rule { protocol: 6, from_port: 80, to_port: 80, remote: Some(group) };
    control.put(put_request::Object::Port(card::Port { egress: vec![web.clone()], ..port() })).await;
    let (neighbour, other_card) = (0x0a00_0006, 0x0aff_000c);
    let mapping =
        |private_ipv4| card::Mapping { private_ipv4, mac: vec![2, 0, 0, 0, 0, 2], underlay_ipv4: other_card, ..card::Mapping::default() };
    let network = card::Network {
        id: "vpc-1".into(),
        generation: 1,
        vni: 7,
        mappings: vec![mapping(neighbour), mapping(neighbour + 1)],
        groups: vec![card::Group { id: "sg-9".into(), members: vec![neighbour] }],
        ..card::Network::default()
    };
    control.put(put_request::Object::Network(network)).await;
    control.until_phase(Kind::Port, "eni-1", Phase::Ready).await;
    let mut packets = PacketsClient::new(rig.channel(Some(&["control"])).await.unwrap());

    let ask = |destination, destination_port| card::ExplainRequest {
        from: Some(card::explain_request::From::PortId("eni-1".into())),
        destination,
        protocol: 6,
        source_port: 4000,
        destination_port,
        tcp_flags: 2,
        length: 60,
        ..card::ExplainRequest::default()
    };
    for _ in 0..2 {
        let passes = packets.explain(ask(neighbour, 80)).await.unwrap().into_inner();
        let way = card::TunnelOut { underlay_ipv4: other_card, vni: 7 };
        assert_eq!(passes.end, Some(card::explain_reply::End::TunnelOut(way)));
        let seen: Vec<_> = passes.steps.into_iter().map(|step| (step.port_id, step.seen.unwrap())).collect();
        let at = |seen: card::step::Seen| ("eni-1".to_owned(), seen);
        let subnet = card::Route { destination: port().subnet, target: None };
        let expected = [
            at(card::step::Seen::Source(card::SourceSeen { address: port().private_ipv4, believed: true, underlay_ipv4: 0 })),
            // The second time too: an explained packet opens nothing.
            at(card::step::Seen::Flow(card::FlowSeen::default())),
            at(card::step::Seen::Group(card::GroupSeen { egress: true, rules: 1, matched: Some(web.clone()) })),
            at(card::step::Seen::Route(card::RouteSeen { matched: Some(subnet), local: true })),
            at(card::step::Seen::Mapping(card::MappingSeen { address: neighbour, underlay_ipv4: other_card, ..Default::default() })),
        ];
        assert_eq!(seen, expected);
    }
    for refused in [ask(neighbour, 81), ask(neighbour + 1, 80)] {
        let reply = packets.explain(refused).await.unwrap().into_inner();
        assert_eq!(reply.end, Some(card::explain_reply::End::Dropped("denied_egress".into())));
    }
    let unknown = card::ExplainRequest { from: Some(card::explain_request::From::PortId("eni-2".into())), ..ask(neighbour, 80) };
    assert_eq!(packets.explain(unknown).await.unwrap_err().code(), tonic::Code::NotFound);
    assert_eq!(packets.explain(card::ExplainRequest::default()).await.unwrap_err().code(), tonic::Code::InvalidArgument);

    let counters = packets.counters(card::CountersRequest {}).await.unwrap().into_inner();
    let device = counters.devices.iter().find(|device| device.name == "eni-1").unwrap();
    assert_eq!((device.instance_id.as_str(), counters.flows), ("i-1", 0));
    assert!(device.events.iter().any(|event| event.name == "no_buffer"), "{device:?}");
    assert!(counters.drops.len() > 30 && counters.drops.iter().all(|drop| drop.value == 0), "{counters:?}");

    let flows = |port_id: &str| card::FlowsRequest { port_id: port_id.into(), cursor: 0, limit: 10 };
    assert_eq!(packets.flows(flows("eni-1")).await.unwrap().into_inner(), card::FlowsReply::default());
    assert_eq!(packets.flows(flows("eni-2")).await.unwrap_err().code(), tonic::Code::NotFound);

    let capture = |filter: &str, port: &str| card::CaptureRequest {
        filter: filter.into(),
        port_ids: vec![port.into()],
        seconds: 1,
        ..card::CaptureRequest::default()
    };
    assert_eq!(packets.capture(capture("tcp prot 80", "eni-1")).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    assert_eq!(packets.capture(capture("tcp", "eni-2")).await.unwrap_err().code(), tonic::Code::NotFound);
    let mut stream = packets.capture(capture("tcp port 80", "eni-1")).await.unwrap().into_inner();
    let last = tokio::time::timeout(Duration::from_secs(5), stream.message()).await.expect("it ends by itself").unwrap();
    assert_eq!(last, Some(card::Captured::default()));
    assert_eq!(stream.message().await.unwrap(), None);

    let mut stranger = PacketsClient::new(rig.channel(Some(&[CARD])).await.unwrap());
    assert_eq!(stranger.counters(card::CountersRequest {}).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    // A capture that nobody waits for does not keep the card.
    let _open = packets.capture(card::CaptureRequest::default()).await.unwrap();
    rig.stop().await;
}
