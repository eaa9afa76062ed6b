//! `cardinal packet top`: rates out of two readings of the counters.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{Top, list, number, text};

/// Clears the screen and goes to its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Counters of everything, under (card, device, counter); a device without a name is the card.
type Reading = BTreeMap<(String, String, String), u64>;

const TRAFFIC: [&str; 4] = ["rxPackets", "rxBytes", "txPackets", "txBytes"];

pub fn run(arguments: &Top) -> Result<ExitCode> {
    let ask = arguments.card.as_ref().map_or_else(|| json!({}), |card| json!({"card": card}));
    let read = || arguments.operator.ask("/packets/counters", &ask);
    let mut before = (Instant::now(), reading(&read()?));
    loop {
        sleep(Duration::from_secs(arguments.interval.into()));
        let answer = read()?;
        let after = (Instant::now(), reading(&answer));
        let rates = Rates { before: &before.1, after: &after.1, seconds: (after.0 - before.0).as_secs_f64() };
        let mut out = std::io::stdout().lock();
        if arguments.json {
            writeln!(out, "{}", rates.json(&answer))?;
        } else {
            let clear = if arguments.once || !std::io::stdout().is_terminal() { "" } else { CLEAR };
            write!(out, "{clear}{}", rates.table(&answer))?;
        }
        out.flush()?;
        if arguments.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = after;
    }
}

fn reading(answer: &Value) -> Reading {
    let mut reading = Reading::new();
    for card in list(answer, "cards") {
        let mut put = |device: &str, name: &str, value: u64| {
            reading.insert((text(card, "card").to_owned(), device.to_owned(), name.to_owned()), value);
        };
        for (reason, count) in counts(card, "drops") {
            put("", reason, count);
        }
        for device in list(card, "devices") {
            let name = text(device, "name");
            TRAFFIC.iter().for_each(|counter| put(name, counter, number(device, counter)));
            for (counter, count) in counts(device, "drops").chain(counts(device, "events")) {
                put(name, counter, count);
            }
        }
    }
    reading
}

fn counts<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = (&'a str, u64)> {
    let counts = value.get(name).and_then(Value::as_object);
    counts.into_iter().flatten().filter_map(|(name, count)| Some((name.as_str(), count.as_u64()?)))
}

struct Rates<'a> {
    before: &'a Reading,
    after: &'a Reading,
    seconds: f64,
}

impl Rates<'_> {
    /// Per second, rounded. A counter that is new began at zero; one that fell was restarted.
    fn of(&self, card: &str, device: &str, name: &str) -> u64 {
        let key = (card.to_owned(), device.to_owned(), name.to_owned());
        let (before, after) = (self.before.get(&key).copied().unwrap_or(0), self.after.get(&key).copied().unwrap_or(0));
        let grown = u32::try_from(after.saturating_sub(before)).unwrap_or(u32::MAX);
        // Not negative, and far below the range of the target.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rate = (f64::from(grown) / self.seconds.max(0.001)).round() as u64;
        rate
    }

    /// The answer, with `rates` beside the totals.
    fn json(&self, answer: &Value) -> Value {
        let mut answer = answer.clone();
        let cards = answer.get_mut("cards").and_then(Value::as_array_mut);
        for card in cards.into_iter().flatten() {
            let id = text(card, "card").to_owned();
            let drops: Map<String, Value> =
                counts(card, "drops").map(|(reason, _)| (reason.to_owned(), self.of(&id, "", reason).into())).collect();
            if let Some(devices) = card.get_mut("devices").and_then(Value::as_array_mut) {
                for device in devices {
                    let name = text(device, "name").to_owned();
                    let counters = TRAFFIC.iter().copied().chain(counts(device, "drops").map(|(reason, _)| reason));
                    let rates: Map<String, Value> =
                        counters.map(|counter| (counter.to_owned(), self.of(&id, &name, counter).into())).collect();
                    if let Some(device) = device.as_object_mut() {
                        device.insert("rates".to_owned(), rates.into());
                    }
                }
            }
            if let Some(card) = card.as_object_mut() {
                card.insert("rates".to_owned(), json!({"drops": drops}));
            }
        }
        answer
    }

    fn table(&self, answer: &Value) -> String {
        let mut out = String::new();
        for card in list(answer, "cards") {
            // Writing to a String does not fail.
            let _ = self.card(&mut out, card);
        }
        out
    }

    fn card(&self, out: &mut String, card: &Value) -> std::fmt::Result {
        let id = text(card, "card");
        writeln!(out, "{id}   {} connections", number(card, "flows"))?;
        writeln!(out, "  {:<24} {:>10} {:>12} {:>10} {:>12}  instance", "device", "in pps", "in bit/s", "out pps", "out bit/s")?;
        for device in list(card, "devices") {
            let name = text(device, "name");
            let rate = |counter| self.of(id, name, counter);
            let (packets_in, bits_in) = (rate("rxPackets"), rate("rxBytes").saturating_mul(8));
            let (packets_out, bits_out) = (rate("txPackets"), rate("txBytes").saturating_mul(8));
            writeln!(out, "  {name:<24} {packets_in:>10} {bits_in:>12} {packets_out:>10} {bits_out:>12}  {}", text(device, "instance"))?;
            for (reason, total) in counts(device, "drops").filter(|(_, total)| *total > 0) {
                writeln!(out, "    dropped {reason:<24} {:>10} /s {total:>12} in all", rate(reason))?;
            }
            for (event, total) in counts(device, "events").filter(|(event, total)| *event != "connections" && *total > 0) {
                writeln!(out, "    device  {event:<24} {:>10} /s {total:>12} in all", rate(event))?;
            }
        }
        for (reason, total) in counts(card, "drops").filter(|(_, total)| *total > 0) {
            writeln!(out, "  dropped {reason:<26} {:>10} /s {total:>12} in all", self.of(id, "", reason))?;
        }
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(packets: u64, drops: u64) -> Value {
        json!({"cards": [{"card": "card-a", "flows": 3, "drops": {"denied_ingress": drops}, "devices": [{
            "name": "eni-1", "instance": "i-1", "rxPackets": packets, "rxBytes": packets * 100, "txPackets": 0, "txBytes": 0,
            "drops": {"denied_ingress": drops}, "events": {"no_buffer": 0},
        }]}]})
    }

    #[test]
    fn rates_are_the_difference_of_two_readings() {
        let (before, after) = (answer(10, 0), answer(30, 4));
        let rates = Rates { before: &reading(&before), after: &reading(&after), seconds: 2.0 };
        let json = rates.json(&after);
        assert_eq!(json.pointer("/cards/0/devices/0/rates/rxPackets"), Some(&json!(10)));
        assert_eq!(json.pointer("/cards/0/devices/0/rates/denied_ingress"), Some(&json!(2)));
        assert_eq!(json.pointer("/cards/0/rates/drops/denied_ingress"), Some(&json!(2)));
        let table = rates.table(&after);
        assert!(table.contains("eni-1") && table.contains("8000") && table.contains("denied_ingress"), "{table}");
    }

    #[test]
    fn a_card_that_restarted_has_no_negative_rate() {
        let rates = Rates { before: &reading(&answer(10, 1)), after: &reading(&answer(5, 1)), seconds: 1.0 };
        assert_eq!(rates.of("card-a", "eni-1", "rxPackets"), 0);
    }
}
