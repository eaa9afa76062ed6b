//! A report as one page: plots in SVG, no script and nothing to load.

use std::fmt::Write;

use serde_json::Value;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 40.0;
const TOP: f64 = 16.0;

/// A point of a sweep over numbers of connections.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Connections offered.
    pub connections: u32,
    /// Millions of packets a second.
    pub mpps: f64,
    /// Whether all of them were tracked.
    pub tracked: bool,
}

/// The page of a report.
pub fn html(report: &Value, sweep: &[Point]) -> String {
    let case = escape(&text(&report["case"]));
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Packets: {case}</title>\n<style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#1a1a1a}}\
         svg{{width:100%;height:auto}}text{{font:12px system-ui,sans-serif;fill:#333}}\
         table{{border-collapse:collapse}}td,th{{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}}\
         .axis{{stroke:#999}}.line{{fill:none;stroke:#1864ab;stroke-width:2}}.bar{{fill:#1864ab}}.other{{fill:#adb5bd}}</style>\n\
         <h1>Packets: {case}</h1>\n"
    );
    facts(&mut page, report);
    section(&mut page, "Windows", "Millions of packets a second in each part of the measured time.", &windows(report));
    section(&mut page, "Cycles", "TSC cycles of a packet: what making it costs, and what the pipeline costs.", &cycles(report));
    section(&mut page, "Against the peer", "Millions of packets a second on the same packets.", &peers(report));
    let points: Vec<(f64, f64)> = sweep.iter().map(|point| (f64::from(point.connections).log2(), point.mpps)).collect();
    let labels: Vec<String> =
        sweep.iter().map(|point| format!("{}{}", power(point.connections), if point.tracked { "" } else { "*" })).collect();
    let note =
        "Millions of packets a second by number of connections, both directions, random order. * the table did not hold all of them.";
    section(&mut page, "Connections", note, &line(&points, &labels, "Mpps"));
    latency(&mut page, report);
    page.push_str("</html>\n");
    page
}

fn facts(page: &mut String, report: &Value) {
    let machine = &report["machine"];
    let rows = [
        ("commit", text(&report["commit"])),
        ("date", text(&report["date"])),
        ("machine", format!("{}, TSC {} MHz, core about {} MHz", text(&machine["cpu"]), machine["tsc_mhz"], machine["core_mhz_estimate"])),
        ("packets", format!("{} Mpps, {} cycles a packet", report["mpps"], report["cycles_per_packet"])),
        ("connections", report["connections"].to_string()),
        ("dropped", report["dropped_total"].to_string()),
        ("allocations", report["allocations"].to_string()),
    ];
    page.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(page, "<tr><th>{name}<td>{}", escape(&value));
    }
    for bar in report["bars"].as_array().into_iter().flatten() {
        let met = if bar["met"] == true { "met" } else { "not met" };
        let _ = write!(page, "<tr><th>{met}<td>{}: asked {}, measured {}", escape(&text(&bar["what"])), bar["asked"], bar["measured"]);
    }
    page.push_str("</table>\n");
}

fn section(page: &mut String, title: &str, note: &str, plot: &str) {
    if !plot.is_empty() {
        let _ = writeln!(page, "<h2>{title}</h2><p>{note}</p>\n{plot}");
    }
}

fn windows(report: &Value) -> String {
    let all: Vec<f64> = report["mpps_of_windows"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let bars: Vec<(String, f64)> = (1..).zip(&all).map(|(number, mpps): (u32, _)| (number.to_string(), *mpps)).collect();
    bars_of(&bars, "Mpps")
}

fn cycles(report: &Value) -> String {
    let named = [
        ("source", &report["source_cycles_per_packet"]),
        ("pipeline", &report["pipeline_cycles_per_packet"]),
        ("reference", at(report, "/reference/cycles_per_packet")),
    ];
    let bars: Vec<(String, f64)> = named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.as_f64()?))).collect();
    bars_of(&bars, "cycles")
}

fn peers(report: &Value) -> String {
    let Some(peer) = report["peer"].as_array() else { return String::new() };
    let mut bars = vec![("this pipeline".to_owned(), report["mpps"].as_f64().unwrap_or(0.0))];
    bars.extend(peer.iter().map(|one| (format!("OVS-DPDK, {}", text(&one["configuration"])), one["mpps"].as_f64().unwrap_or(0.0))));
    bars_of(&bars, "Mpps")
}

fn latency(page: &mut String, report: &Value) {
    for load in at(report, "/search/latency").as_array().into_iter().flatten() {
        let mut named: Vec<(String, f64)> =
            load["us"].as_object().into_iter().flatten().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect();
        named.sort_by(|a, b| a.1.total_cmp(&b.1));
        // Each step is ten times rarer, and longer by powers of ten.
        let points: Vec<(f64, f64)> = (0u32..).zip(&named).map(|(step, (_, us))| (f64::from(step), us.max(0.01).log10())).collect();
        let labels: Vec<String> = named.iter().map(|(name, us)| format!("{name} {us} us")).collect();
        let title = format!("Latency at {} of the load found", load["load_share"]);
        section(page, &title, "Logarithm of microseconds, from arrival to the end of the turn.", &line(&points, &labels, "log10 us"));
    }
}

fn bars_of(bars: &[(String, f64)], unit: &str) -> String {
    let highest = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    if highest <= 0.0 {
        return String::new();
    }
    let mut svg = open(highest, 0.0, unit);
    let step = (WIDTH - LEFT) / bars.len() as f64;
    for (number, (name, value)) in (0u32..).zip(bars) {
        let (x, tall) = (LEFT + step * f64::from(number), (HEIGHT - TOP - BOTTOM) * value / highest);
        let class = if name.starts_with("OVS") || name == "reference" { "other" } else { "bar" };
        let y = HEIGHT - BOTTOM - tall;
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"><title>{} {value:.3}</title></rect>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x + step * 0.1,
            step * 0.8,
            escape(name),
            x + step / 2.0,
            HEIGHT - BOTTOM + 16.0,
            escape(name),
        );
        if bars.len() <= 8 {
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value:.1}</text>", x + step / 2.0, y - 3.0);
        }
    }
    svg + "</svg>"
}

fn line(points: &[(f64, f64)], labels: &[String], unit: &str) -> String {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let highest = points.iter().map(|point| point.1).fold(f64::MIN, f64::max).max(0.001);
    let lowest = points.iter().map(|point| point.1).fold(0.0, f64::min);
    let mut svg = open(highest, lowest, unit);
    let across = |x: f64| LEFT + 20.0 + (WIDTH - LEFT - 60.0) * (x - first.0) / (last.0 - first.0).max(1e-9);
    let up = |y: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - lowest) / (highest - lowest);
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
    let _ = write!(svg, "<polyline class=\"line\" points=\"{}\"/>", path.join(" "));
    for ((x, y), label) in points.iter().zip(labels) {
        let short = label.split(' ').next().unwrap_or_default();
        let _ = write!(
            svg,
            "<circle class=\"bar\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}: {y:.3}</title></circle>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            across(*x),
            up(*y),
            escape(label),
            across(*x),
            HEIGHT - BOTTOM + 16.0,
            escape(short),
        );
    }
    svg + "</svg>"
}

fn open(highest: f64, lowest: f64, unit: &str) -> String {
    let floor = HEIGHT - BOTTOM;
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><path class=\"axis\" fill=\"none\" d=\"M{LEFT} {TOP}V{floor}H{WIDTH}\"/>\
         <text x=\"{0}\" y=\"{1}\" text-anchor=\"end\">{highest:.1}</text><text x=\"{0}\" y=\"{floor}\" text-anchor=\"end\">{lowest:.1}</text>\
         <text x=\"{0}\" y=\"{2}\" text-anchor=\"end\">{unit}</text>",
        LEFT - 6.0,
        TOP + 10.0,
        TOP + 26.0,
    )
}

fn power(connections: u32) -> String {
    match connections {
        0..1024 => connections.to_string(),
        1024..1_048_576 => format!("{}k", connections >> 10),
        _ => format!("{}M", connections >> 20),
    }
}

/// The value at a path; null where there is none.
fn at<'a>(report: &'a Value, path: &str) -> &'a Value {
    report.pointer(path).unwrap_or(&Value::Null)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_what_the_report_holds_and_loads_nothing() {
        let report = serde_json::json!({
            "case": "<case>", "mpps": 5.0, "source_cycles_per_packet": 50.0, "pipeline_cycles_per_packet": 300.0,
            "peer": [{ "configuration": "as it comes", "mpps": 1.5 }],
            "search": { "latency": [{ "load_share": 0.5, "us": { "p50": 1.0, "p99": 10.0 } }] },
        });
        let sweep = [1 << 10, 1 << 20].map(|connections| Point { connections, mpps: 3.0, tracked: connections < 1 << 20 });
        let page = html(&report, &sweep);
        assert_eq!(page.matches("<svg").count(), 4, "cycles, peer, connections, latency");
        for shown in ["OVS-DPDK, as it comes", "1k", "1M*", "&lt;case&gt;", "p99 10 us"] {
            assert!(page.contains(shown), "{shown}");
        }
        for absent in ["<case>", "<script", "http", "src="] {
            assert!(!page.contains(absent), "{absent}");
        }
    }
}
