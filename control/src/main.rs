//! The control plane's daemon: reads its settings and rows, then serves tenants, the operator and the cards until SIGTERM.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use control::api::Api;
use control::cards::Cards;
use control::model::Time;
use control::resource::{image, region};
use control::settings::Settings;
use control::store::{self, Sqlite};
use control::throttle::Throttle;
use control::world::{Entropy, Region, World, Zone};
use control::{admin, reconcile, server};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// The control plane of a Cardinal region.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The settings, a TOML file.
    #[arg(long)]
    config: PathBuf,
    /// Checks the settings and ends.
    #[arg(long)]
    check_config: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let settings = Settings::read(&arguments.config)?;
    if arguments.check_config {
        return Ok(());
    }
    raise_file_limit();
    // The store holds secrets of access keys: what this process writes is for its own user.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    std::fs::create_dir_all(&settings.state_dir).with_context(|| format!("creating {}", settings.state_dir.display()))?;
    let opened = Sqlite::open(&settings.state_dir.join("control.db")).and_then(store::open).context("opening the store")?;
    let zones = settings.zones.iter().enumerate();
    let zones = zones.map(|(index, name)| Zone { name: name.clone(), id: region::zone_id(&settings.region, index) });
    let region = Region { name: settings.region.clone(), zones: zones.collect(), public_pool: settings.public_pool.clone() };
    let world = Arc::new(World::new(region, opened.tables, Entropy::System, Box::new(opened.writer), opened.durable));
    image::register_folder(&world, &settings.images_dir, Time::now()).context("registering the public images")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(serve(&settings, world))
}

async fn serve(settings: &Settings, world: Arc<World>) -> Result<()> {
    let epoch = reconcile::take_over(&world, Time::now()).await.context("taking over the region")?;
    let (cards, inputs) = Cards::start(&settings.cards, &settings.tls, epoch).context("connecting to the cards")?;
    let cards = Arc::new(cards);
    let api = Api::new(world.clone(), Some(cards.clone()), settings.throttle.then(Throttle::default));
    let listener = TcpListener::bind(settings.listen).await.with_context(|| format!("listening on {}", settings.listen))?;
    let socket = settings.state_dir.join("admin.sock");
    let operator = admin::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move {
        // An error means that the sender is gone, and the daemon with it.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let operator = tokio::spawn(admin::serve(operator, api.clone(), wait(stopped.clone())));
    let tenants = tokio::spawn(server::serve(listener, api.router(), wait(stopped)));
    let mut reconciler = tokio::spawn(reconcile::run(world.clone(), inputs, move |card, operation| cards.send(&card, operation)));
    let images = tokio::spawn(image::watch_folder(world.clone(), settings.images_dir.clone()));
    tracing::info!(listen = %settings.listen, region = settings.region, epoch, throttle = settings.throttle, "ready");
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // Without cards there is nobody to agree with, and the reconciler ends at once.
        ended = &mut reconciler, if !settings.cards.is_empty() => {
            ended.context("the reconciler")?.context("the reconciler")?;
            bail!("the reconciler ended");
        }
    }
    tracing::info!("stopping");
    stop.send_replace(true);
    tenants.await.context("the tenants' listener")?.context("the tenants' listener")?;
    operator.await.context("the operator's listener")?.context("the operator's socket")?;
    reconciler.abort();
    images.abort();
    Ok(())
}

/// Every connection takes a descriptor, and the usual soft limit of 1,024 is for programs that call select.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}
