//! A tenant at the command line: EC2 calls by the `cardinal` command, and ssh.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use crate::{build, connect, region};

/// Credentials and endpoint of one account.
pub struct Tenant {
    endpoint: String,
    region: String,
    access_key_id: String,
    secret_access_key: String,
}

/// The XML answer of one call.
pub struct Answer(String);

impl Tenant {
    /// The tenant that `account` (the JSON of `cardinal account create`) names.
    pub fn of(endpoint: &str, region: &str, account: &Value) -> Result<Self> {
        let text = |name: &str| account[name].as_str().map(str::to_owned).ok_or_else(|| anyhow!("no {name} in the account"));
        Ok(Self {
            endpoint: endpoint.to_owned(),
            region: region.to_owned(),
            access_key_id: text("access_key_id")?,
            secret_access_key: text("secret_access_key")?,
        })
    }

    /// The tenant of a running region.
    pub fn at(dir: &Path) -> Result<Self> {
        let ready = region::ready(dir)?;
        let text = |name: &str| ready[name].as_str().unwrap_or_default().to_owned();
        Self::of(&text("endpoint"), &text("region"), &ready)
    }

    /// Calls an EC2 action; `Err` carries the error code and message.
    pub fn call(&self, action: &str, parameters: &[(&str, &str)]) -> Result<Answer> {
        let mut command = self.cardinal()?;
        command.args(["call", action]);
        for (name, value) in parameters {
            command.arg(format!("{name}={value}"));
        }
        let output = command.output().context("cardinal call")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            let answer = String::from_utf8_lossy(&output.stdout);
            bail!("{action}: {}{}", error.trim(), answer.trim());
        }
        Ok(Answer(String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    /// The health report of control.
    pub fn healthz(&self) -> Result<Value> {
        let host = self.endpoint.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (_, body) = text.split_once("\r\n\r\n").ok_or_else(|| anyhow!("no body from /healthz"))?;
        Ok(serde_json::from_str(body)?)
    }

    /// Public images by name.
    pub fn images(&self) -> Result<BTreeMap<String, String>> {
        let answer = self.call("DescribeImages", &[("Owner.1", "amazon")])?;
        let mut images = BTreeMap::new();
        for item in answer.all("imageId") {
            let name = answer.after(&item, "name").unwrap_or_default();
            images.insert(name, item);
        }
        Ok(images)
    }

    /// Key pair `rack` and a security group of that name which lets ssh and ping in.
    pub fn prepare_login(&self, public_key: &[u8]) -> Result<()> {
        let encoded = BASE64.encode(public_key);
        match self.call("ImportKeyPair", &[("KeyName", "rack"), ("PublicKeyMaterial", &encoded)]) {
            Err(error) if !error.to_string().contains("InvalidKeyPair.Duplicate") => {
                return Err(error);
            }
            _ => {}
        }
        match self.call("CreateSecurityGroup", &[("GroupName", "rack"), ("GroupDescription", "ssh and ping from anywhere")]) {
            Err(error) if error.to_string().contains("InvalidGroup.Duplicate") => return Ok(()),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        let rules = [
            ("IpPermissions.1.IpProtocol", "tcp"),
            ("IpPermissions.1.FromPort", "22"),
            ("IpPermissions.1.ToPort", "22"),
            ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
            ("IpPermissions.2.IpProtocol", "icmp"),
            ("IpPermissions.2.FromPort", "-1"),
            ("IpPermissions.2.ToPort", "-1"),
            ("IpPermissions.2.IpRanges.1.CidrIp", "0.0.0.0/0"),
        ];
        let mut parameters = vec![("GroupName", "rack")];
        parameters.extend(rules);
        self.call("AuthorizeSecurityGroupIngress", &parameters)?;
        Ok(())
    }

    /// Polls an instance until `name` has the wanted value.
    pub fn wait(&self, instance: &str, state: &str, at_most: Duration) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let answer = self.call("DescribeInstances", &[("InstanceId.1", instance)])?;
            if answer.within("instanceState", "name").as_deref() == Some(state) {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > at_most {
                bail!("{instance} is not {state} after {at_most:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn cardinal(&self) -> Result<Command> {
        let mut command = Command::new(build::binary("cardinal")?);
        command
            .env("AWS_ENDPOINT_URL", &self.endpoint)
            .env("AWS_DEFAULT_REGION", &self.region)
            .env("AWS_ACCESS_KEY_ID", &self.access_key_id)
            .env("AWS_SECRET_ACCESS_KEY", &self.secret_access_key);
        Ok(command)
    }
}

impl Answer {
    /// The text of the first element of that name.
    pub fn first(&self, name: &str) -> Option<String> {
        self.all(name).into_iter().next()
    }

    /// The first element, or an error that names it.
    pub fn need(&self, name: &str) -> Result<String> {
        self.first(name).ok_or_else(|| anyhow!("the answer has no {name}"))
    }

    /// The texts of all elements of that name.
    pub fn all(&self, name: &str) -> Vec<String> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        self.0.split(&open).skip(1).filter_map(|rest| rest.split_once(&close).map(|(text, _)| unescape(text))).collect()
    }

    /// The first element `name` behind the text `mark`.
    pub fn after(&self, mark: &str, name: &str) -> Option<String> {
        let (_, rest) = self.0.split_once(mark)?;
        Answer(rest.to_owned()).first(name)
    }

    /// The first element `name` inside the first element `outer`.
    pub fn within(&self, outer: &str, name: &str) -> Option<String> {
        Answer(self.first(outer)?).first(name)
    }
}

/// `cargo rack ssh`.
pub fn ssh(dir: &Path, instance_and_command: &[String]) -> Result<ExitCode> {
    let (instance, command) = match instance_and_command.split_first() {
        Some((first, rest)) if first.starts_with("i-") => (Some(first.as_str()), rest),
        _ => (None, instance_and_command),
    };
    let tenant = Tenant::at(dir)?;
    let filters = [("Filter.1.Name", "instance-state-name"), ("Filter.1.Value.1", "running"), ("Filter.1.Value.2", "pending")];
    let answer = match instance {
        Some(id) => tenant.call("DescribeInstances", &[("InstanceId.1", id)])?,
        None => tenant.call("DescribeInstances", &filters)?,
    };
    let id = answer.all("instanceId").pop().ok_or_else(|| anyhow!("no instance runs; start one first"))?;
    let id = instance.map_or(id, str::to_owned);
    let error = login(dir, &tenant, &id, 60)?.args(command).exec();
    Err(error).context("ssh")
}

/// An ssh command line to an instance, once its ssh port answers within `wait_s`.
pub fn login(dir: &Path, tenant: &Tenant, instance: &str, wait_s: u64) -> Result<Command> {
    let ready = region::ready(dir)?;
    let answer = tenant.call("DescribeInstances", &[("InstanceId.1", instance)])?;
    let address = answer.first("ipAddress").ok_or_else(|| anyhow!("{instance} has no public address"))?;
    let image = answer.need("imageId")?;
    let name = ready["images"].as_object().into_iter().flatten().find(|(_, id)| id.as_str() == Some(&image)).map(|(name, _)| name.clone());
    let user = name.and_then(|name| ready["users"][&name].as_str().map(str::to_owned)).unwrap_or_else(|| "ec2-user".to_owned());
    let base = || {
        let mut command = connect::ssh(dir, &ready);
        command.args(["-q", "-i"]).arg(dir.join("keys/rack"));
        command.args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ConnectTimeout=2",
            "-o",
            "ServerAliveInterval=3",
        ]);
        command.arg(format!("{user}@{address}"));
        command
    };
    let deadline = Instant::now() + Duration::from_secs(wait_s);
    while !base().args(["-o", "BatchMode=yes", "true"]).status()?.success() {
        if Instant::now() > deadline {
            bail!("no login at {user}@{address} within {wait_s} s (does a security group open port 22?)");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(base())
}

/// `cargo rack console`.
pub fn console(dir: &Path, instance: &str, once: bool) -> Result<ExitCode> {
    let tenant = Tenant::at(dir)?;
    let mut shown: Vec<u8> = Vec::new();
    loop {
        let answer = tenant.call("GetConsoleOutput", &[("InstanceId", instance)])?;
        let output = BASE64.decode(answer.first("output").unwrap_or_default()).context("console output")?;
        // The console is a window of the newest bytes: print what follows what was shown.
        let fresh = match shown.len().min(output.len()) {
            0 => &output[..],
            _ if output.starts_with(&shown) => output.get(shown.len()..).unwrap_or_default(),
            _ => &output[..],
        };
        std::io::stdout().write_all(fresh)?;
        std::io::stdout().flush()?;
        shown = output.clone();
        if once {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#xA;", "\n")
        .replace("&#xD;", "\r")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_by_element_name() {
        let answer = Answer("<a><state><name>up</name></state><name>x &amp; y</name></a>".to_owned());
        assert_eq!(answer.within("state", "name").as_deref(), Some("up"));
        assert_eq!(answer.all("name"), ["up", "x & y"]);
        assert_eq!(answer.first("absent"), None);
    }
}
