//! A region under test, started by the rack and spoken to from outside.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::answer::{Answer, Refusal};

/// The root of the project.
#[must_use]
pub fn project_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("hw-sim has a parent folder").to_owned()
}

/// True for root; otherwise prints why the test does nothing. A region needs
/// network namespaces.
#[must_use]
pub fn root_or_skip(test: &str) -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    #[allow(unsafe_code)]
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        println!("{test}: skipped, a region needs root for its network namespaces");
    }
    root
}

/// A running region; it ends with this value.
pub struct Region {
    dir: PathBuf,
    ready: Value,
    rack: Child,
    credentials: (String, String),
}

/// One process as the ready file names it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Such as `card-a-1`.
    pub name: String,
    /// `control`, `card` or `host`.
    pub kind: String,
    /// Availability zone; empty for control.
    pub zone: String,
    /// The command line that starts it again.
    pub restart: String,
    /// Its log.
    pub log: PathBuf,
}

/// An instance and where it can be reached.
#[derive(Debug, Clone)]
pub struct Instance {
    /// `i-...`.
    pub id: String,
    /// Inside its VPC.
    pub private_address: String,
    /// On the simulated internet.
    pub public_address: String,
    /// Login user of its image.
    pub user: String,
}

static PORT: AtomicU16 = AtomicU16::new(0);

impl Region {
    /// Starts a region named after its test with these flags of `rack up`.
    #[must_use]
    pub fn start(name: &str, flags: &[&str]) -> Self {
        let dir = project_root().join("target/tests").join(name);
        let rack = Self::binary("rack");
        let _ = Command::new(&rack).args(["down", "--dir"]).arg(&dir).stderr(Stdio::null()).status();
        std::fs::create_dir_all(dir.parent().expect("a parent")).expect("target/tests");
        Self::run(name, dir, Command::new(rack), flags)
    }

    /// Starts a region as an ordinary user with this id, with copies of binaries and
    /// images in a folder of that user. Only root can.
    #[must_use]
    pub fn start_as(user: u32, name: &str, flags: &[&str]) -> Self {
        let home = std::env::temp_dir().join(format!("cardinal-{name}-{}", std::process::id()));
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-ec", script, "sh"]).arg(&home).arg(Self::binary("")).arg(project_root().join("target/images"));
            let output = command.output().expect("sh");
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        };
        shell(
            "rm -rf \"$1\"; mkdir -p \"$1/images\"; cd \"$2\"; cp rack nitro-card thin-hv control cardinal internet \"$1\"; \
             cd \"$3\"; cp --sparse=always mini.* cloud.* \"$1/images\"",
        );
        shell(&format!("chown -R {user}:{user} \"$1\""));
        let mut rack = Command::new("setpriv");
        rack.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--no-new-privs", "--"]);
        rack.arg(home.join("rack")).current_dir(&home).env("HOME", &home);
        let images = home.join("images");
        let images = images.to_str().expect("a path of letters");
        Self::run(name, home.join("region"), rack, &[&["--images", images], flags].concat())
    }

    fn run(name: &str, dir: PathBuf, mut rack: Command, flags: &[&str]) -> Self {
        let port = 20_000 + (std::process::id() % 20_000) as u16 + PORT.fetch_add(1, Ordering::Relaxed);
        let ready_file = dir.with_extension("ready");
        let log = std::fs::File::create(dir.with_extension("log")).expect("log of the rack");
        let mut rack = rack
            .args(["up", "--no-build", "--no-debian", "--listen", &format!("127.0.0.1:{port}"), "--dir"])
            .arg(&dir)
            .arg("--ready-file")
            .arg(&ready_file)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("rack up");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready_file.exists() {
            let ended = rack.try_wait().expect("rack").is_some();
            assert!(
                !ended && Instant::now() < deadline,
                "the region {name} did not start:\n{}",
                std::fs::read_to_string(dir.with_extension("log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let ready: Value = serde_json::from_slice(&std::fs::read(&ready_file).expect("ready file")).expect("ready file is JSON");
        let text = |key: &str| ready[key].as_str().unwrap_or_else(|| panic!("{key} in the ready file")).to_owned();
        let credentials = (text("access_key_id"), text("secret_access_key"));
        Self { dir, ready, rack, credentials }
    }

    /// A binary of this build; of no name: the folder of all.
    #[must_use]
    pub fn binary(name: &str) -> PathBuf {
        let mut path = std::env::current_exe().expect("own path");
        path.pop();
        if path.ends_with("deps") {
            path.pop();
        }
        path.join(name)
    }

    /// What the ready file says under `key`.
    #[must_use]
    pub fn ready(&self, key: &str) -> &Value {
        &self.ready[key]
    }

    /// The folder of the region.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `http://127.0.0.1:port`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.ready["endpoint"].as_str().expect("endpoint").to_owned()
    }

    /// The AMI of an image by name.
    #[must_use]
    pub fn image(&self, name: &str) -> String {
        self.ready["images"][name].as_str().unwrap_or_else(|| panic!("image {name}")).to_owned()
    }

    /// Environment of an SDK or awscli that speaks to this region.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_DEFAULT_REGION", self.ready["region"].as_str().expect("region").to_owned()),
            ("AWS_ACCESS_KEY_ID", self.credentials.0.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.credentials.1.clone()),
        ]
    }

    /// Calls an EC2 action as the region's first account.
    pub fn try_call(&self, action: &str, parameters: &[(&str, &str)]) -> Result<Answer, Refusal> {
        self.try_call_as(&self.credentials, action, parameters)
    }

    /// Calls an EC2 action with these keys.
    pub fn try_call_as(&self, keys: &(String, String), action: &str, parameters: &[(&str, &str)]) -> Result<Answer, Refusal> {
        let output = Command::new(Self::binary("cardinal"))
            .args(["call", action])
            .args(parameters.iter().map(|(name, value)| format!("{name}={value}")))
            .envs(self.environment())
            .env("AWS_ACCESS_KEY_ID", &keys.0)
            .env("AWS_SECRET_ACCESS_KEY", &keys.1)
            .output()
            .expect("cardinal call");
        let answer = Answer(String::from_utf8_lossy(&output.stdout).into_owned());
        if output.status.success() {
            return Ok(answer);
        }
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        match answer.first("Code") {
            Some(code) => Err(Refusal { code, message: answer.first("Message").unwrap_or_default() }),
            None => panic!("{action} got no answer of EC2's form: {} {errors}", answer.0),
        }
    }

    /// Calls an EC2 action that has to be accepted.
    #[must_use]
    pub fn call(&self, action: &str, parameters: &[(&str, &str)]) -> Answer {
        self.try_call(action, parameters).unwrap_or_else(|refusal| panic!("{action} {parameters:?} was refused: {refusal:?}"))
    }

    /// The code with which an action is refused; panics when it is accepted.
    #[must_use]
    pub fn refusal(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        match self.try_call(action, parameters) {
            Ok(answer) => panic!("{action} {parameters:?} was accepted: {}", answer.0),
            Err(refusal) => refusal.code,
        }
    }

    /// Calls REST; the status and the JSON body.
    #[must_use]
    pub fn rest(&self, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
        let output = Command::new(Self::binary("cardinal"))
            .args(["rest", method, path])
            .args(body)
            .envs(self.environment())
            .output()
            .expect("cardinal rest");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let status = errors.split_whitespace().filter_map(|word| word.parse::<u16>().ok()).find(|word| (100..600).contains(word));
        let status = status.unwrap_or(if output.status.success() { 200 } else { 0 });
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{method} {path}: {error}: {text} {errors}")))
    }

    /// A fresh account's access key and secret.
    #[must_use]
    pub fn account(&self) -> (String, String) {
        let output = Command::new(Self::binary("cardinal"))
            .args(["account", "create", "--json", "--admin-socket"])
            .arg(self.dir.join("control/admin.sock"))
            .output()
            .expect("cardinal account create");
        let account: Value = serde_json::from_slice(&output.stdout).expect("account is JSON");
        let text = |key: &str| account[key].as_str().unwrap_or_else(|| panic!("{key} in {account}")).to_owned();
        (text("access_key_id"), text("secret_access_key"))
    }

    /// Runs `cardinal packet` with these arguments.
    #[must_use]
    pub fn packet(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Self::binary("cardinal"));
        command.arg("packet").args(arguments).arg("--admin-socket").arg(self.dir.join("control/admin.sock")).stdin(Stdio::null());
        command
    }

    /// Launches one `mini` with the rack's key and group and these parameters.
    #[must_use]
    pub fn launch(&self, more: &[(&str, &str)]) -> Instance {
        let image = self.image("mini");
        let mut parameters = vec![("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1")];
        for default in [("InstanceType", "t3.micro"), ("KeyName", "rack"), ("SecurityGroup.1", "rack")] {
            let replaced = more.iter().any(|(name, _)| {
                *name == default.0
                    || (default.0.starts_with("SecurityGroup") && (name.starts_with("SecurityGroup") || name.starts_with("Network")))
            });
            // A group by name means the default VPC.
            let elsewhere = default.0.starts_with("SecurityGroup") && more.iter().any(|(name, _)| *name == "SubnetId");
            if !replaced && !elsewhere {
                parameters.push(default);
            }
        }
        parameters.retain(|(name, _)| !more.iter().any(|(other, _)| other == name));
        parameters.extend(more);
        let id = self.call("RunInstances", &parameters).need("instanceId");
        self.wait_state(&id, "running", 60);
        self.instance(&id)
    }

    /// Where an instance can be reached now.
    #[must_use]
    pub fn instance(&self, id: &str) -> Instance {
        let answer = self.call("DescribeInstances", &[("InstanceId.1", id)]);
        let image = answer.need("imageId");
        let images = self.ready["images"].as_object().expect("images");
        let name = images.iter().find(|(_, ami)| ami.as_str() == Some(&image)).map(|(name, _)| name.as_str());
        Instance {
            id: id.to_owned(),
            private_address: answer.first("privateIpAddress").unwrap_or_default(),
            public_address: answer.first("ipAddress").unwrap_or_default(),
            user: name.and_then(|name| self.ready["users"][name].as_str()).unwrap_or("ec2-user").to_owned(),
        }
    }

    /// The state name of an instance.
    #[must_use]
    pub fn state(&self, id: &str) -> String {
        let answer = self.call("DescribeInstances", &[("InstanceId.1", id)]);
        answer.within("instanceState").expect("a state").need("name")
    }

    /// Waits until an instance is in a state.
    pub fn wait_state(&self, id: &str, state: &str, at_most_s: u64) {
        self.eventually(&format!("{id} is {state}"), at_most_s, || self.state(id) == state);
    }

    /// Waits until a volume is in a state, and attached when that is `in-use`.
    pub fn wait_volume(&self, id: &str, state: &str) {
        self.eventually(&format!("{id} is {state}"), 30, || {
            let answer = self.call("DescribeVolumes", &[("VolumeId.1", id)]);
            let attached = answer.within("attachmentSet").and_then(|set| set.first("status"));
            answer.all("status").contains(&state.to_owned()) && (state != "in-use" || attached.as_deref() == Some("attached"))
        });
    }

    /// Terminates instances and waits until they are gone.
    pub fn terminate(&self, ids: &[&str]) {
        for id in ids {
            let _ = self.call("TerminateInstances", &[("InstanceId.1", id)]);
        }
        for id in ids {
            self.wait_state(id, "terminated", 60);
        }
    }

    /// Polls until `condition` holds; returns the seconds that it took.
    pub fn eventually(&self, what: &str, at_most_s: u64, mut condition: impl FnMut() -> bool) -> f64 {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < Duration::from_secs(at_most_s), "after {at_most_s} s it does not hold that {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
        begun.elapsed().as_secs_f64()
    }

    /// A rack command about this region, as the user that started it.
    #[must_use]
    pub fn rack(&self, user: u32, command: &str, arguments: &[&str]) -> Output {
        let mut rack = Command::new("setpriv");
        rack.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--"]);
        rack.arg(self.dir.with_file_name("rack")).args([command, "--dir"]).arg(&self.dir).args(arguments);
        rack.stdin(Stdio::null()).output().expect("setpriv")
    }

    /// Runs a command on the simulated internet side.
    #[must_use]
    pub fn on_internet(&self, command: &[&str]) -> Output {
        let namespace = self.ready["internet_namespace"].as_str().expect("namespace");
        Command::new("ip").args(["netns", "exec", namespace]).args(command).stdin(Stdio::null()).output().expect("ip netns exec")
    }

    /// An ssh command line from the internet side.
    #[must_use]
    pub fn ssh_command(&self, instance: &Instance) -> Command {
        let mut command = match self.ready["internet_namespace"].as_str() {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, "ssh"]);
                command
            }
            None => {
                let mut command = Command::new("ssh");
                let (rack, dir) = (Self::binary("rack"), self.dir.display());
                command.args(["-o", &format!("ProxyCommand='{}' connect --dir '{dir}' %h %p", rack.display())]);
                command
            }
        };
        command.args(["-q", "-i"]).arg(self.dir.join("keys/rack"));
        command.args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ConnectTimeout=2",
            // A guest that goes down says nothing: do not wait for it.
            "-o",
            "ServerAliveInterval=3",
            "-o",
            "BatchMode=yes",
        ]);
        command.arg(format!("{}@{}", instance.user, instance.public_address)).stdin(Stdio::null());
        command
    }

    /// Waits until an instance lets the owner of the rack's key in.
    pub fn wait_ssh(&self, instance: &Instance, at_most_s: u64) -> f64 {
        self.eventually(&format!("{} lets ssh in", instance.id), at_most_s, || {
            self.ssh_command(instance).arg("true").status().is_ok_and(|status| status.success())
        })
    }

    /// Runs a command in a guest; its output and whether it succeeded.
    #[must_use]
    pub fn try_ssh(&self, instance: &Instance, command: &str) -> (bool, String) {
        let output = self.ssh_command(instance).arg(command).output().expect("ssh");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs a command in a guest that has to succeed.
    #[must_use]
    pub fn ssh(&self, instance: &Instance, command: &str) -> String {
        let output = self.ssh_command(instance).arg(command).output().expect("ssh");
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "in {}: {command}: {} {text} {errors}", instance.id, output.status);
        text.trim().to_owned()
    }

    /// True when `from` gets ping answers from `address`.
    #[must_use]
    pub fn pings(&self, from: &Instance, address: &str) -> bool {
        self.try_ssh(from, &format!("ping -c 3 -i 0.3 -W 1 {address}")).0
    }

    /// The console of an instance.
    #[must_use]
    pub fn console(&self, id: &str) -> String {
        let encoded = self.call("GetConsoleOutput", &[("InstanceId", id)]).first("output").unwrap_or_default();
        let mut child = Command::new("base64").args(["-d", "-i"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("base64");
        let mut input = child.stdin.take().expect("stdin");
        let writer = std::thread::spawn(move || input.write_all(encoded.as_bytes()));
        let output = child.wait_with_output().expect("base64");
        writer.join().expect("writer").expect("base64 takes its input");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The processes of the region.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let list = self.ready["processes"].as_array().expect("processes");
        let text = |process: &Value, key: &str| process[key].as_str().unwrap_or_default().to_owned();
        list.iter()
            .map(|process| Process {
                name: text(process, "name"),
                kind: text(process, "kind"),
                zone: text(process, "zone"),
                restart: text(process, "restart"),
                log: text(process, "log").into(),
            })
            .collect()
    }

    /// The process of that name.
    #[must_use]
    pub fn process(&self, name: &str) -> Process {
        self.processes().into_iter().find(|process| process.name == name).unwrap_or_else(|| panic!("process {name}"))
    }

    /// Pids of the processes whose command line contains `mark`.
    #[must_use]
    pub fn pids(&self, mark: &str) -> Vec<i32> {
        let dir = format!("{}/", self.dir.display());
        let mut pids = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(bytes) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let command = String::from_utf8_lossy(&bytes).replace('\0', " ");
            if command.contains(&dir) && command.contains(mark) && !command.contains("rack up") && !command.contains("rack down") {
                pids.push(pid);
            }
        }
        pids
    }

    /// The pid of a daemon.
    #[must_use]
    pub fn pid(&self, name: &str) -> i32 {
        let pids = self.pids(&format!("/{name}.toml"));
        assert_eq!(pids.len(), 1, "{name} runs {} times", pids.len());
        pids[0]
    }

    /// SIGKILL, and the process is gone when this returns.
    pub fn kill(&self, name: &str) {
        let pid = self.pid(name);
        // SAFETY: kill takes plain integers; the pid is a daemon of this region.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(pid, libc::SIGKILL) };
        assert_eq!(result, 0, "SIGKILL to {name}");
        // Its command line goes before its sockets do: only a zombie has closed them.
        self.eventually(&format!("{name} is gone"), 5, || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with('Z') || state.starts_with('X'))
        });
    }

    /// Starts a killed process again, as the ready file says.
    pub fn restart(&self, name: &str) {
        let process = self.process(name);
        let status = Command::new("setsid").args(["sh", "-c", &process.restart]).stdin(Stdio::null()).status().expect("sh");
        assert!(status.success(), "{}", process.restart);
    }

    /// The card that holds an instance: the one whose link folder its machine names.
    #[must_use]
    pub fn card_of(&self, instance: &str) -> String {
        for process in self.processes().iter().filter(|process| process.kind == "card") {
            let place = process.name.trim_start_matches("card-");
            let link = format!("link-{place}/");
            let found = self.pids(&link).into_iter().any(|pid| {
                std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(instance))
            });
            if found {
                return process.name.clone();
            }
        }
        panic!("no machine of {instance} runs")
    }

    /// The Prometheus page of a card.
    #[must_use]
    pub fn card_metrics(&self, card: &str) -> String {
        let config = std::fs::read_to_string(self.dir.join(format!("{card}.toml"))).expect("card settings");
        let line = config.lines().find(|line| line.starts_with("metrics_listen")).expect("metrics_listen");
        get(line.split('"').nth(1).expect("an address"), "/metrics")
    }

    /// The id under which control knows a card.
    #[must_use]
    pub fn card_id(&self, card: &str) -> String {
        let config = std::fs::read_to_string(self.dir.join(format!("{card}.toml"))).expect("card settings");
        let line = config.lines().find(|line| line.starts_with("id")).expect("id");
        line.split('"').nth(1).expect("a quoted id").to_owned()
    }

    /// Sum of the samples of a card's metric whose line contains every mark.
    #[must_use]
    pub fn card_metric(&self, card: &str, marks: &[&str]) -> f64 {
        let page = self.card_metrics(card);
        page.lines()
            .filter(|line| !line.starts_with('#') && marks.iter().all(|mark| line.contains(mark)))
            .filter_map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()))
            .sum()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let pid = i32::try_from(self.rack.id()).expect("a pid");
        // SAFETY: kill takes plain integers; the pid is our own child, not yet waited for.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::kill(pid, libc::SIGTERM) };
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if matches!(self.rack.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.rack.kill();
        let _ = self.rack.wait();
        let _ = Command::new(Self::binary("rack")).args(["down", "--dir"]).arg(&self.dir).status();
    }
}

/// The body of an HTTP GET.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).expect("request");
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}
