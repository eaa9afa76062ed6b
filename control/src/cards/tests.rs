use std::net::SocketAddr;
use std::pin::Pin;

use card_proto::card::card_server::{Card, CardServer};
use card_proto::card::{ConsoleBytes, ConsoleInput, ConsoleOutputReply, ConsoleOutputRequest, DeleteReply, Event, PutReply};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Response, Status, Streaming};

use super::*;
use crate::model::{Instance, InstanceState};
use crate::reconcile::testbed::{ALICE, CARD_B, FakeCard, Testbed, request};
use crate::resource::instance::run_instances;
use crate::resource::security_group_rule::authorize_security_group_ingress;
use crate::shapes::{AuthorizeSecurityGroupIngressRequest, IpPermission, IpRange};
use crate::world::World;

/// A fake card behind the real protocol.
#[derive(Clone)]
struct Service(Arc<Mutex<Shared>>);

struct Shared {
    card: FakeCard,
    watchers: Vec<mpsc::UnboundedSender<Result<Event, Status>>>,
    epochs: Vec<u64>,
}

impl Service {
    fn new(card: FakeCard) -> Self {
        Self(Arc::new(Mutex::new(Shared { card, watchers: Vec::new(), epochs: Vec::new() })))
    }

    fn take(&self, operation: Operation) -> Result<(), Status> {
        let mut shared = self.0.lock().unwrap();
        let mut result = Ok(());
        for input in shared.card.take(operation) {
            match input {
                Input::Event(event) => shared.watchers.retain(|watcher| watcher.send(Ok(Event { event: Some(event.clone()) })).is_ok()),
                Input::Refused(_, _, message) => result = Err(Status::invalid_argument(message)),
                Input::Outdated(_, _, message) => result = Err(Status::failed_precondition(message)),
                _ => {}
            }
        }
        result
    }
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Card for Service {
    type WatchStream = Boxed<Event>;
    type ConsoleStream = Boxed<ConsoleBytes>;

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutReply>, Status> {
        let object = match request.into_inner().object.unwrap() {
            put_request::Object::Network(object) => Object::Network(object),
            put_request::Object::Volume(object) => Object::Volume(object),
            put_request::Object::Disk(object) => Object::Disk(object),
            put_request::Object::Port(object) => Object::Port(object),
            put_request::Object::Instance(object) => Object::Instance(object),
            put_request::Object::NatGateway(object) => Object::NatGateway(object),
        };
        self.take(Operation::Put(Box::new(object))).map(|()| Response::new(PutReply {}))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteReply>, Status> {
        let request = request.into_inner();
        let kind = match request.kind() {
            Kind::Network => ObjectKind::Network,
            Kind::Volume => ObjectKind::Volume,
            Kind::Disk => ObjectKind::Disk,
            Kind::Port => ObjectKind::Port,
            Kind::NatGateway => ObjectKind::NatGateway,
            _ => ObjectKind::Instance,
        };
        self.take(Operation::Delete((kind, request.id), request.generation)).map(|()| Response::new(DeleteReply {}))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut shared = self.0.lock().unwrap();
        shared.epochs.push(request.into_inner().epoch);
        let (sender, receiver) = mpsc::unbounded_channel();
        for input in shared.card.connect() {
            if let Input::Event(event) = input {
                sender.send(Ok(Event { event: Some(event) })).unwrap();
            }
        }
        shared.watchers.push(sender);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    async fn console_output(&self, request: Request<ConsoleOutputRequest>) -> Result<Response<ConsoleOutputReply>, Status> {
        let output = format!("console of {}", request.into_inner().instance_id).into_bytes();
        Ok(Response::new(ConsoleOutputReply { output, timestamp_s: 7 }))
    }

    async fn console(&self, request: Request<Streaming<ConsoleInput>>) -> Result<Response<Self::ConsoleStream>, Status> {
        let echo = request.into_inner().map(|message| message.map(|message| ConsoleBytes { data: message.data.to_ascii_uppercase() }));
        Ok(Response::new(Box::pin(echo)))
    }
}

/// An authority, and files of a certificate for each name.
struct Authority {
    folder: tempfile::TempDir,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { folder: tempfile::tempdir().unwrap(), pem, issuer: Issuer::new(params, key) }
    }

    fn identity(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn tls(&self) -> settings::Tls {
        let (certificate, key) = self.identity("control");
        let write = |name: &str, text: &str| {
            let path = self.folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        settings::Tls {
            authority: write("ca.pem", &self.pem),
            certificate: write("control.pem", &certificate),
            key: write("control.key", &key),
        }
    }

    fn serve(&self, name: &str, address: SocketAddr, service: &Service) -> JoinHandle<()> {
        let (certificate, key) = self.identity(name);
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key)).client_ca_root(Certificate::from_pem(&self.pem));
        let server = Server::builder().tls_config(tls).unwrap().add_service(CardServer::new(service.clone()));
        tokio::spawn(async move { server.serve(address).await.unwrap() })
    }
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn until(what: &str, limit: Duration, mut reached: impl FnMut() -> bool) -> Duration {
    let since = Instant::now();
    while !reached() {
        assert!(since.elapsed() < limit, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    since.elapsed()
}

fn watched(world: &World) -> bool {
    world.read(|tx| tx.get::<crate::model::Card>(crate::model::REGION, CARD_B).is_some_and(|card| card.watched)).0
}

/// A world of one card of the second zone, and what serves it.
struct Region {
    authority: Authority,
    address: SocketAddr,
    service: Service,
    world: Arc<World>,
    cards: Arc<Cards>,
}

impl Region {
    async fn start() -> (Self, JoinHandle<()>) {
        // Only the accounts and the image of the bed are used here.
        let mut bed = Testbed::new();
        let card = bed.cards.remove(CARD_B).unwrap();
        let world = Arc::clone(&bed.world);
        let mut tx = world.begin();
        for card in tx.all::<crate::model::Card>().map(|card| card.id.clone()).collect::<Vec<_>>() {
            tx.delete::<crate::model::Card>(crate::model::REGION, &card);
        }
        tx.commit();
        let (authority, address, service) = (Authority::new(), free_address(), Service::new(card));
        let server = authority.serve(CARD_B, address, &service);
        let (cards, inputs) = Cards::start(&[settings::Card { id: CARD_B.into(), address }], &authority.tls(), 9).unwrap();
        let cards = Arc::new(cards);
        let sender = Arc::clone(&cards);
        tokio::spawn(crate::reconcile::run(Arc::clone(&world), inputs, move |card, operation| sender.send(&card, operation)));
        until("the card is watched", Duration::from_secs(5), || watched(&world)).await;
        (Self { authority, address, service, world, cards }, server)
    }

    fn launch(&self) -> String {
        let principal = crate::auth::Principal::for_test(ALICE);
        let (answer, _) = self.world.call(&principal, crate::model::Time::now(), |call| run_instances(call, request("us-east-1b")));
        answer.unwrap().instances[0].instance_id.clone().unwrap()
    }

    fn is_running(&self, id: &str) -> bool {
        self.world.read(|tx| tx.get::<Instance>(ALICE, id).unwrap().state == InstanceState::Running).0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_runs_and_a_rule_arrives_in_well_under_a_second() {
    let (region, _server) = Region::start().await;
    let id = region.launch();
    until("running", Duration::from_secs(5), || region.is_running(&id)).await;
    assert_eq!(region.service.0.lock().unwrap().epochs, [9]);
    let group = region.service.0.lock().unwrap().card.port(&id).security_group_ids[0].clone();
    let permission = IpPermission {
        ip_protocol: Some("tcp".into()),
        from_port: Some(22),
        to_port: Some(22),
        ip_ranges: vec![IpRange { cidr_ip: Some("0.0.0.0/0".into()), ..Default::default() }],
        ..Default::default()
    };
    let change = AuthorizeSecurityGroupIngressRequest { group_id: Some(group), ip_permissions: vec![permission], ..Default::default() };
    let principal = crate::auth::Principal::for_test(ALICE);
    region.world.call(&principal, crate::model::Time::now(), |call| authorize_security_group_ingress(call, change)).0.unwrap();
    let took = until("the rule", Duration::from_secs(1), || {
        region.service.0.lock().unwrap().card.port(&id).ingress.iter().any(|rule| rule.to_port == 22)
    })
    .await;
    assert!(took < Duration::from_millis(500), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_card_is_watched_again_at_once_and_a_launch_meanwhile_is_not_lost() {
    let (region, server) = Region::start().await;
    let id = region.launch();
    until("running", Duration::from_secs(5), || region.is_running(&id)).await;
    server.abort();
    region.service.0.lock().unwrap().watchers.clear();
    until("lost", Duration::from_secs(5), || !watched(&region.world)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let puts = region.service.0.lock().unwrap().card.puts;
    let _server = region.authority.serve(CARD_B, region.address, &region.service);
    let took = until("watched again", Duration::from_secs(5), || watched(&region.world)).await;
    assert!(took < Duration::from_millis(600), "{took:?}");
    assert!(region.is_running(&id));
    let next = region.launch();
    until("the next one runs", Duration::from_secs(5), || region.is_running(&next)).await;
    assert!(puts < region.service.0.lock().unwrap().card.puts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consoles_are_read_and_typed_into() {
    let (region, _server) = Region::start().await;
    assert_eq!(region.cards.console_output(CARD_B, "i-1").await.unwrap(), (b"console of i-1".to_vec(), 7));
    assert!(matches!(region.cards.console_output("card-x", "i-1").await, Err(CardError::Unknown(_))));
    let (keys, receiver) = mpsc::channel(1);
    let mut console = region.cards.console(CARD_B, "i-1", receiver).await.unwrap();
    assert_eq!(console.next().await.unwrap(), Some(Vec::new()));
    keys.send(b"ls".to_vec()).await.unwrap();
    assert_eq!(console.next().await.unwrap(), Some(b"LS".to_vec()));
    drop(keys);
    assert_eq!(console.next().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_under_another_name_or_authority_is_not_believed() {
    let authority = Authority::new();
    let other_authority = Authority::new();
    let tls = authority.tls();
    // The right name from the wrong authority, the wrong name, and the right certificate for a card that calls itself something else.
    let cases = [(&other_authority, CARD_B, CARD_B), (&authority, "card-x", CARD_B), (&authority, CARD_B, "card-x")];
    for (signed_by, name, claims) in cases {
        let address = free_address();
        let service = Service::new(FakeCard::new(claims, "us-east-1b", 1, 8));
        let _server = signed_by.serve(name, address, &service);
        let (_cards, mut inputs) = Cards::start(&[settings::Card { id: CARD_B.into(), address }], &tls, 1).unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        while let Ok((_, input)) = inputs.try_recv() {
            assert_eq!(input, Input::Gone, "{name} {claims}");
        }
    }
}
