//! How much load passes without loss, and how long packets take: RFC 2544 section
//! 26.1 and MLRsearch (draft-ietf-bmwg-mlrsearch), with the goals that CSIT uses.
//!
//! | search | loss ratio | trials |
//! |---|---|---|
//! | `ndr` | 0 | one of `--seconds` at each load decides it |
//! | `pdr` | 0.5 % | likewise |
//! | `mlr` | 0 and 0.5 % | 21 of a 21st of `--seconds`, or as many as decide it: at most half may exceed the goal |
//!
//! Loads are bisected to a width of 0.5 % of the load, from the rate that the core
//! reaches unpaced; a first trial there warms up and is not looked at. The load is
//! paced in software, in the same thread, so that a pause of the machine is loss, as
//! it would be on a wire. At SCHED_FIFO Linux takes 5 % of each second for others
//! (`kernel.sched_rt_runtime_us`): one trial of a second then loses at any load, and
//! `mlr`, which lets trials exceed, is the search for such a machine.
//!
//! Latency is measured after the search at 10, 50 and 90 % of the PDR. It holds no
//! link and no device: from a packet's arrival to the end of its turn.

use serde_json::{Map, Value, json};

use super::bench::Bench;
use super::clock::Clock;
use super::generate::{Conversations, Shape};
use super::paced::{self, DEPTH, Histogram, Stream};
use super::report;

/// A method of searching.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Search {
    /// No loss, RFC 2544.
    Ndr,
    /// At most 0.5 % of loss, RFC 2544.
    Pdr,
    /// Both, by MLRsearch.
    Mlr,
}

/// What a search looks for.
struct Goal {
    name: &'static str,
    loss_ratio: f64,
    trials: u32,
    /// Share of the trials that may lose more.
    exceed: f64,
}

const PDR_LOSS: f64 = 0.005;
const WIDTH: f64 = 0.005;
const TRIALS: u32 = 21;
/// Below this share of the unpaced rate nothing is searched.
const FLOOR: f64 = 0.05;

/// Runs a search over a shape's traffic, and latency at shares of what it found.
pub fn run(clock: &Clock, search: Search, shape: &Shape, seconds: f64) -> Map<String, Value> {
    let mut lab = Lab { clock, bench: Bench::new(&shape.world()), source: shape.source() };
    let unpaced = lab.bench.run(clock, &mut lab.source, 5, 0.05);
    let top = clock.hz() / report::fastest(&unpaced.windows);
    let goals: &[Goal] = match search {
        Search::Ndr => &[Goal { name: "ndr", loss_ratio: 0.0, trials: 1, exceed: 0.0 }],
        Search::Pdr => &[Goal { name: "pdr", loss_ratio: PDR_LOSS, trials: 1, exceed: 0.0 }],
        Search::Mlr => &[
            Goal { name: "ndr", loss_ratio: 0.0, trials: TRIALS, exceed: 0.5 },
            Goal { name: "pdr", loss_ratio: PDR_LOSS, trials: TRIALS, exceed: 0.5 },
        ],
    };
    let mut fields = Map::new();
    let mut base = None;
    for goal in goals {
        let trial = seconds / f64::from(goal.trials);
        lab.trial(top, trial);
        let (found, steps) = lab.bisect(goal, trial, top);
        fields.insert(
            goal.name.to_owned(),
            json!({
                "mpps": found.map(|load| report::round(load / 1e6)),
                "loss_ratio": goal.loss_ratio,
                "exceed_ratio": goal.exceed,
                "trial_s": report::round(trial),
                "width": WIDTH,
                "loads": steps,
            }),
        );
        base = found.or(base);
    }
    if let Some(base) = base {
        let latency = [0.1, 0.5, 0.9].map(|share| lab.latency(share, base, seconds));
        fields.insert("latency".to_owned(), latency.into_iter().collect());
    }
    fields.insert("ring_depth".to_owned(), DEPTH.into());
    fields
}

struct Lab<'a> {
    clock: &'a Clock,
    bench: Bench,
    source: Conversations,
}

impl Lab<'_> {
    /// The loss ratio at a load.
    fn trial(&mut self, load: f64, seconds: f64) -> f64 {
        let mut streams = [Stream::new(self.clock, &mut self.source, load)];
        paced::run(self.clock, &mut self.bench, &mut streams, seconds, None, |_, _| ());
        let [stream] = &streams;
        stream.loss_ratio()
    }

    /// Whether a load meets a goal: trials until no further one could change that.
    fn meets(&mut self, goal: &Goal, load: f64, seconds: f64) -> bool {
        let allowed = f64::from(goal.trials) * goal.exceed;
        let (mut good, mut bad) = (0, 0);
        loop {
            if self.trial(load, seconds) <= goal.loss_ratio {
                good += 1
            } else {
                bad += 1
            }
            if f64::from(bad) > allowed {
                return false;
            }
            if f64::from(goal.trials - good) <= allowed {
                return true;
            }
        }
    }

    /// The highest load that meets a goal, if any above the floor does, and each load
    /// that was tried.
    fn bisect(&mut self, goal: &Goal, seconds: f64, top: f64) -> (Option<f64>, Vec<Value>) {
        let (mut low, mut high, mut steps) = (None, top, Vec::new());
        loop {
            let bottom = low.unwrap_or(top * FLOOR);
            if (high - bottom) / high < WIDTH {
                return (low, steps);
            }
            let load = f64::midpoint(bottom, high);
            let met = self.meets(goal, load, seconds);
            steps.push(json!({ "mpps": report::round(load / 1e6), "met": met }));
            if met { low = Some(load) } else { high = load }
        }
    }

    fn latency(&mut self, share: f64, base: f64, seconds: f64) -> Value {
        let mut histogram = Histogram::new();
        let mut streams = [Stream::new(self.clock, &mut self.source, (base * share).max(1.0))];
        paced::run(self.clock, &mut self.bench, &mut streams, seconds, Some(&mut histogram), |_, _| ());
        let [stream] = &streams;
        let microseconds = |part| report::round(histogram.quantile(part) as f64 / self.clock.hz() * 1e6);
        json!({
            "load_share": share,
            "mpps": report::round(base * share / 1e6),
            "packets": histogram.total(),
            "loss_ratio": report::round(stream.loss_ratio()),
            "us": {
                "p50": microseconds(0.5),
                "p90": microseconds(0.9),
                "p99": microseconds(0.99),
                "p99.9": microseconds(0.999),
                "p99.99": microseconds(0.9999),
                "p99.999": microseconds(0.99999),
                "p99.9999": microseconds(0.999_999),
                "max": microseconds(1.0),
            },
        })
    }
}
