//! Writes `control/src/shapes.rs` from the public service model of EC2.
//!
//! Input: the path of `service-2.json` (or `.gz`) of API version 2016-11-15, as botocore ships it, and a list of
//! operations. Output: one macro invocation for each structure that those operations reach, in alphabetical order, and
//! the lists of allowed words. The macros stand in `control/src/shape.rs` and hold all logic; this program only
//! translates names and types.
//!
//! Wire names follow the `ec2` protocol: in requests `queryName`, else `locationName` with a capital first letter,
//! else the member's name; in answers `locationName`, else the member's name.
//!
//! ```text
//! cargo run -p generator -- service-2.json.gz control/generator/operations.txt > control/src/shapes.rs
//! ```

#![allow(clippy::indexing_slicing)] // a JSON value answers null to a name that it lacks

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Longer lists of words (instance types) are catalogues, which the actions check themselves.
const LONGEST_ENUM: usize = 200;

/// `max_width` of `rustfmt.toml`.
const LINE_WIDTH: usize = 140;

/// Shapes of which EC2 leaves out lists that are empty.
const SPARSE: [&str; 6] =
    ["AvailabilityZone", "DescribeNetworkInterfaceAttributeResult", "Instance", "InstanceAttribute", "InstanceNetworkInterface", "Region"];

/// Members of sparse shapes whose empty list EC2 does send.
const ALWAYS: [(&str, &str); 8] = [
    ("AvailabilityZone", "Messages"),
    ("Instance", "BlockDeviceMappings"),
    ("Instance", "NetworkInterfaces"),
    ("Instance", "ProductCodes"),
    ("Instance", "SecurityGroups"),
    ("InstanceNetworkInterface", "Groups"),
    ("InstanceNetworkInterface", "Ipv6Addresses"),
    ("InstanceNetworkInterface", "PrivateIpAddresses"),
];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(operations), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        bail!("usage: generator SERVICE-2.JSON[.gz] OPERATIONS.TXT");
    };
    let model: Value = serde_json::from_slice(&read(Path::new(&model))?).context("the model is not JSON")?;
    let operations = std::fs::read_to_string(&operations).with_context(|| format!("reading {operations}"))?;
    let operations: Vec<&str> = operations.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    print!("{}", Generator::new(&model, &operations)?.write()?);
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "gz") {
        let output = Command::new("gzip").arg("-dc").arg(path).output().context("running gzip")?;
        if !output.status.success() {
            bail!("gzip: {}", String::from_utf8_lossy(&output.stderr));
        }
        return Ok(output.stdout);
    }
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

struct Generator<'a> {
    shapes: &'a Value,
    /// Structures that requests reach, and those that answers reach.
    inputs: BTreeSet<&'a str>,
    outputs: BTreeSet<&'a str>,
    roots: BTreeSet<&'a str>,
    /// Words that a member may hold, by the name of their shape.
    words: BTreeMap<&'a str, Vec<&'a str>>,
}

impl<'a> Generator<'a> {
    fn new(model: &'a Value, operations: &[&str]) -> Result<Self> {
        let mut generator = Self {
            shapes: &model["shapes"],
            inputs: BTreeSet::new(),
            outputs: BTreeSet::new(),
            roots: BTreeSet::new(),
            words: BTreeMap::new(),
        };
        for name in operations {
            let operation = &model["operations"][*name];
            if operation.is_null() {
                bail!("the model has no operation {name}");
            }
            if let Some(input) = operation["input"]["shape"].as_str() {
                generator.roots.insert(input);
                generator.reach(input, true)?;
            }
            if let Some(output) = operation["output"]["shape"].as_str() {
                generator.reach(output, false)?;
            }
        }
        Ok(generator)
    }

    fn shape(&self, name: &str) -> Result<&'a Value> {
        let shape = &self.shapes[name];
        if shape.is_null() {
            bail!("the model has no shape {name}");
        }
        Ok(shape)
    }

    fn reach(&mut self, name: &'a str, input: bool) -> Result<()> {
        let shape = self.shape(name)?;
        match text(&shape["type"])? {
            "structure" => {
                let seen = if input { &mut self.inputs } else { &mut self.outputs };
                if seen.insert(name) {
                    for (_, member) in members(shape)? {
                        self.reach(text(&member["shape"])?, input)?;
                    }
                }
            }
            "list" => self.reach(text(&shape["member"]["shape"])?, input)?,
            "string" if input => {
                if let Some(words) = shape["enum"].as_array().filter(|words| words.len() <= LONGEST_ENUM) {
                    let mut words = words.iter().map(text).collect::<Result<Vec<_>>>()?;
                    words.sort_unstable();
                    self.words.insert(name, words);
                }
            }
            "map" => bail!("{name} is a map, which the ec2 protocol does not have"),
            _ => {}
        }
        Ok(())
    }

    fn write(&self) -> Result<String> {
        let mut out = String::from(
            "//! Request and answer shapes of EC2 2016-11-15. Generated by `control/generator` from the public service model\n\
             //! (Apache-2.0); do not edit. Macros and traits: [`crate::shape`].\n\n\
             #![allow(missing_docs)] // the service model documents every member\n\n\
             use crate::shape::{Blob, Timestamp, answer, record, request, requests};\n\n",
        );
        for name in self.inputs.union(&self.outputs) {
            self.structure(name, &mut out)?;
        }
        out.push_str("// Requests, and whether they can be tried without effect.\n");
        for name in &self.roots {
            let dry_run = self.shape(name)?["members"]["DryRun"].is_object();
            writeln!(out, "requests!({name}, {});", if dry_run { "dry_run" } else { "always" })?;
        }
        out.push_str("\n// Words that a member may hold, sorted.\n");
        for (name, words) in &self.words {
            let constant = snake(name).to_uppercase();
            let line = format!("pub const {constant}: &[&str] = &{words:?};");
            // As rustfmt would break it.
            if line.len() <= LINE_WIDTH {
                writeln!(out, "{line}")?;
            } else {
                writeln!(out, "pub const {constant}: &[&str] = &[")?;
                words.iter().try_for_each(|word| writeln!(out, "    {word:?},"))?;
                writeln!(out, "];")?;
            }
        }
        Ok(out)
    }

    fn structure(&self, name: &str, out: &mut String) -> Result<()> {
        let shape = self.shape(name)?;
        let (input, output) = (self.inputs.contains(name), self.outputs.contains(name));
        let form = match (input, output) {
            (true, false) => "request",
            (false, _) => "answer",
            (true, true) => "record",
        };
        let required: Vec<&str> = match shape["required"].as_array() {
            Some(required) => required.iter().map(text).collect::<Result<_>>()?,
            None => Vec::new(),
        };
        writeln!(out, "{form}! {{ {name} {{")?;
        for (member_name, member) in members(shape)? {
            let (kind, rule) = self.kind(text(&member["shape"])?)?;
            write!(out, "    {}: {kind}", field(member_name))?;
            let location = member["locationName"].as_str();
            if input {
                let query = match (member["queryName"].as_str(), location) {
                    (Some(query), _) => query.to_owned(),
                    (None, Some(location)) => capital(location),
                    (None, None) => member_name.to_owned(),
                };
                write!(out, ", {query:?}")?;
            }
            if output {
                write!(out, ", {:?}", location.unwrap_or(member_name))?;
            }
            let sparse = !input && SPARSE.contains(&name) && kind.starts_with("Vec") && !ALWAYS.contains(&(name, member_name));
            let required = input && required.contains(&member_name);
            let rules = [sparse.then(|| "sparse".to_owned()), required.then(|| "required".to_owned()), rule.filter(|_| input)];
            match rules.into_iter().flatten().collect::<Vec<_>>().join(", ").as_str() {
                "" => out.push_str(";\n"),
                rules => writeln!(out, " [{rules}];")?,
            }
        }
        out.push_str("}}\n\n");
        Ok(())
    }

    /// The Rust type of a member, and what a request's value has to fulfil.
    fn kind(&self, name: &'a str) -> Result<(String, Option<String>)> {
        let shape = self.shape(name)?;
        if text(&shape["type"])? == "list" {
            let (element, rule) = self.scalar(text(&shape["member"]["shape"])?)?;
            return Ok((format!("Vec<{element}>"), rule));
        }
        let (kind, rule) = self.scalar(name)?;
        Ok((format!("Option<{kind}>"), rule))
    }

    fn scalar(&self, name: &'a str) -> Result<(&'a str, Option<String>)> {
        let shape = self.shape(name)?;
        Ok(match text(&shape["type"])? {
            "structure" => (name, None),
            "string" => ("String", self.words.contains_key(name).then(|| format!("one_of {}", snake(name).to_uppercase()))),
            kind @ ("integer" | "long") => {
                let range = match (shape["min"].as_i64(), shape["max"].as_i64()) {
                    (Some(min), Some(max)) => Some(format!("within {min}..={max}")),
                    _ => None,
                };
                (if kind == "integer" { "i32" } else { "i64" }, range)
            }
            "boolean" => ("bool", None),
            "double" | "float" => ("f64", None),
            "timestamp" => ("Timestamp", None),
            "blob" => ("Blob", None),
            kind => bail!("shape {name} has the unknown type {kind}"),
        })
    }
}

fn members(shape: &Value) -> Result<impl Iterator<Item = (&str, &Value)>> {
    let members = shape["members"].as_object().context("a structure without members")?;
    Ok(members.iter().map(|(name, member)| (name.as_str(), member)))
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("{value} is not text"))
}

fn capital(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect()
}

fn field(name: &str) -> String {
    let name = snake(name);
    match name.as_str() {
        "type" | "return" | "use" | "where" | "match" | "final" => format!("r#{name}"),
        _ => name,
    }
}

/// `VpcId` becomes `vpc_id`, `CPUOptions` `cpu_options`, `Ipv6CIDRBlock` `ipv6_cidr_block`.
fn snake(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    let mut out = String::new();
    for (index, letter) in letters.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|before| letters.get(before));
        let after = letters.get(index + 1);
        let starts_word =
            letter.is_uppercase() && before.is_some_and(|before| !before.is_uppercase() || after.is_some_and(|after| after.is_lowercase()));
        if starts_word && !out.ends_with('_') {
            out.push('_');
        }
        if letter.is_alphanumeric() {
            out.push(letter.to_ascii_lowercase());
        } else {
            out.push('_');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_become_snake_case() {
        for (name, snake_name) in [
            ("VpcId", "vpc_id"),
            ("Ipv6CidrBlock", "ipv6_cidr_block"),
            ("CPUOptions", "cpu_options"),
            ("EnableResourceNameDnsAAAARecord", "enable_resource_name_dns_aaaa_record"),
            ("dryRun", "dry_run"),
        ] {
            assert_eq!(snake(name), snake_name);
        }
    }

    #[test]
    fn only_what_the_operations_reach_is_written() {
        let model = json!({
            "operations": {"Get": {"input": {"shape": "GetRequest"}, "output": {"shape": "GetResult"}}, "Other": {"input": {"shape": "Hidden"}}},
            "shapes": {
                "GetRequest": {"type": "structure", "required": ["Kind"], "members": {
                    "DryRun": {"shape": "Boolean"},
                    "Ids": {"shape": "Ids", "locationName": "id"},
                    "Kind": {"shape": "Kind", "queryName": "KIND"},
                    "MaxResults": {"shape": "Max"},
                }},
                "GetResult": {"type": "structure", "members": {"Items": {"shape": "Items", "locationName": "itemSet"}}},
                "Item": {"type": "structure", "members": {"At": {"shape": "Date", "locationName": "at"}}},
                "Hidden": {"type": "structure", "members": {}},
                "Boolean": {"type": "boolean"},
                "Date": {"type": "timestamp"},
                "Kind": {"type": "string", "enum": ["b", "a"]},
                "Max": {"type": "integer", "min": 5, "max": 10},
                "String": {"type": "string"},
                "Ids": {"type": "list", "member": {"shape": "String"}},
                "Items": {"type": "list", "member": {"shape": "Item"}},
            },
        });
        let written = Generator::new(&model, &["Get"]).unwrap().write().unwrap();
        let (_, body) = written.split_once("requests};\n\n").unwrap();
        assert_eq!(
            body,
            "request! { GetRequest {\n    dry_run: Option<bool>, \"DryRun\";\n    ids: Vec<String>, \"Id\";\n    \
             kind: Option<String>, \"KIND\" [required, one_of KIND];\n    max_results: Option<i32>, \"MaxResults\" [within 5..=10];\n}}\n\n\
             answer! { GetResult {\n    items: Vec<Item>, \"itemSet\";\n}}\n\n\
             answer! { Item {\n    at: Option<Timestamp>, \"at\";\n}}\n\n\
             // Requests, and whether they can be tried without effect.\nrequests!(GetRequest, dry_run);\n\n\
             // Words that a member may hold, sorted.\npub const KIND: &[&str] = &[\"a\", \"b\"];\n"
        );
        assert!(Generator::new(&model, &["Nothing"]).is_err());
    }
}
