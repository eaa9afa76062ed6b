//! `cardinal packet`: what operators ask the packet paths of the cards.

mod capture;
mod top;

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::Operator;

/// Connections asked for at a time.
const FLOWS_PAGE: u64 = 512;

#[derive(Subcommand)]
pub enum Packet {
    /// Writes the frames that pass the edges of cards as pcapng, with the reason of those that die.
    Capture(Capture),
    /// Says why a packet would pass or die, step by step on every card that it passes. Sends nothing and changes nothing.
    Trace(Trace),
    /// Shows rates per port and per drop reason, refreshed.
    Top(Top),
    /// Lists the connections that are tracked at a port.
    Flows(Flows),
}

#[derive(Args)]
pub struct Capture {
    /// Only this card; without it and the next two, all cards.
    #[arg(long)]
    card: Option<String>,
    /// Only the traffic of this instance: at its interfaces, on the wires of its card, and where it dies.
    #[arg(long, conflicts_with = "port")]
    instance: Option<String>,
    /// Only the traffic of this interface, as eni-0123456789abcdef0.
    #[arg(long)]
    port: Option<String>,
    /// As pcap-filter has it, about the innermost packet: 'tcp and port 80 and host 10.0.1.5'; also 'vni 7', 'outer host
    /// 10.255.0.11', 'dropped', 'dropped denied_ingress'.
    #[arg(long, default_value = "")]
    filter: String,
    /// Ends after so many frames.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    count: u64,
    /// Ends after so long; an hour at most.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    seconds: u32,
    /// Keeps so many bytes of each frame.
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
    snaplen: u32,
    /// The file; - is the standard output.
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    write: PathBuf,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Args)]
pub struct Trace {
    /// The sender: i-..., eni-..., or an address on the internet.
    #[arg(long)]
    from: String,
    /// The receiver: an address, or i-... or eni-... for its private one.
    #[arg(long)]
    to: String,
    /// tcp, udp, icmp, or a number.
    #[arg(long, default_value = "tcp")]
    protocol: String,
    /// The receiver's port, of TCP and UDP.
    #[arg(long)]
    port: Option<u16>,
    /// The sender's port; of ICMP the identifier.
    #[arg(long)]
    source_port: Option<u16>,
    /// Instead of the sender's own address.
    #[arg(long)]
    source: Option<Ipv4Addr>,
    /// Of ICMP; without it an echo request.
    #[arg(long)]
    icmp_type: Option<u8>,
    /// Of ICMP.
    #[arg(long)]
    icmp_code: Option<u8>,
    /// A packet in the middle of a TCP connection, not the one that opens it.
    #[arg(long)]
    established: bool,
    /// Bytes of the IP packet.
    #[arg(long)]
    length: Option<u16>,
    /// Prints the answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Args)]
pub struct Top {
    /// Only this card.
    #[arg(long)]
    card: Option<String>,
    /// Time between two readings.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    interval: u16,
    /// Prints one table, of the rates between two readings, and ends.
    #[arg(long)]
    once: bool,
    /// Prints JSON, one object for each table, with totals and rates.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    operator: Operator,
}

#[derive(Args)]
pub struct Flows {
    /// The interface: eni-..., or i-... for its first one.
    #[arg(long)]
    port: String,
    /// Shows so many.
    #[arg(long, default_value_t = 100)]
    limit: u64,
    /// Prints one JSON object for each.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    operator: Operator,
}

/// Does what was asked. A trace that dies fails the command, so that scripts need not read.
pub fn run(packet: Packet) -> Result<ExitCode> {
    match packet {
        Packet::Capture(arguments) => capture::run(&arguments),
        Packet::Trace(arguments) => trace(arguments),
        Packet::Top(arguments) => top::run(&arguments),
        Packet::Flows(arguments) => flows(&arguments),
    }
}

fn trace(arguments: Trace) -> Result<ExitCode> {
    let mut ask = Map::new();
    ask.insert("from".into(), arguments.from.into());
    ask.insert("to".into(), arguments.to.into());
    ask.insert("protocol".into(), arguments.protocol.into());
    ask.insert("established".into(), arguments.established.into());
    for (name, value) in [
        ("port", arguments.port.map(Value::from)),
        ("source_port", arguments.source_port.map(Value::from)),
        ("source", arguments.source.map(|source| source.to_string().into())),
        ("icmp_type", arguments.icmp_type.map(Value::from)),
        ("icmp_code", arguments.icmp_code.map(Value::from)),
        ("length", arguments.length.map(Value::from)),
    ] {
        if let Some(value) = value {
            ask.insert(name.into(), value);
        }
    }
    let answer = arguments.operator.ask("/packets/trace", &Value::Object(ask))?;
    let passes = answer.get("passes").and_then(Value::as_bool).context("the answer lacks passes")?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{answer}")?;
    } else {
        for hop in list(&answer, "hops") {
            writeln!(out, "{}", text(hop, "card"))?;
            for step in list(hop, "steps") {
                let mark = if step.get("passes") == Some(&Value::Bool(true)) { "ok " } else { "NO " };
                writeln!(out, "  {mark} {:<15} {:<22} {}", text(step, "stage"), text(step, "port"), text(step, "text"))?;
            }
        }
        writeln!(out, "{}: {}", if passes { "passes" } else { "dies" }, text(&answer, "end"))?;
    }
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn flows(arguments: &Flows) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let (mut cursor, mut left) = (0, arguments.limit);
    if !arguments.json {
        writeln!(
            out,
            "{:<5} {:<22} {:<22} {:<12} {:>9} {:>9}  packets from and to the guest",
            "proto", "local", "remote", "state", "idle s", "limit s"
        )?;
    }
    while left > 0 {
        let ask = json!({"port": arguments.port, "cursor": cursor, "limit": left.min(FLOWS_PAGE)});
        let page = arguments.operator.ask("/packets/flows", &ask)?;
        let flows = list(&page, "flows");
        for flow in flows {
            if arguments.json {
                writeln!(out, "{flow}")?;
                continue;
            }
            let end = |side: &str| format!("{}:{}", text(flow, side), number(flow, &format!("{side}Port")));
            let seconds = |name: &str| number(flow, name) / 1000;
            let ways: Vec<&str> = [text(flow, "egress"), text(flow, "ingress")].into_iter().filter(|way| !way.is_empty()).collect();
            writeln!(
                out,
                "{:<5} {:<22} {:<22} {:<12} {:>9} {:>9}  {}",
                text(flow, "protocol"),
                end("local"),
                end("remote"),
                text(flow, "state"),
                seconds("idleMs"),
                seconds("idleLimitMs"),
                ways.join(", ")
            )?;
        }
        left = left.saturating_sub(u64::try_from(flows.len())?);
        cursor = number(&page, "cursor");
        if cursor == 0 {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}
