//! `cardinal`: the operator's and the tenant's command.
//!
//! ```text
//! cardinal account create --json --admin-socket state/admin.sock
//! cardinal packet trace --from i-0123456789abcdef0 --to 172.31.0.5 --protocol tcp --port 80
//! cardinal packet capture --instance i-0123456789abcdef0 --filter 'icmp' -w ping.pcapng
//! cardinal call DescribeInstances InstanceId.1=i-0123456789abcdef0
//! cardinal rest POST /api/v1/instances '{"imageId": "...", "instanceType": "t3.micro"}'
//! cardinal authority init --dir tls && cardinal authority issue --dir tls --name control
//! ```

mod authority;
mod client;
mod packet;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use serde_json::Value;

use client::{Answer, Endpoint};

/// Operates a Cardinal region and calls its API.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Accounts, through the operator's socket of the control plane.
    #[command(subcommand)]
    Account(Account),
    /// The packet paths of the cards, through the same socket: what passes, what dies, and why.
    #[command(subcommand)]
    Packet(packet::Packet),
    /// Calls an action of the EC2 Query protocol (or STS GetCallerIdentity) and prints the XML.
    Call {
        /// As DescribeInstances.
        action: String,
        /// As InstanceId.1=i-0123456789abcdef0.
        parameters: Vec<String>,
        #[command(flatten)]
        access: Access,
    },
    /// Calls the REST interface and prints the JSON.
    Rest {
        /// GET, POST, PUT, DELETE.
        method: String,
        /// As /api/v1/instances?instanceIds=i-0123456789abcdef0.
        path: String,
        /// JSON.
        body: Option<String>,
        #[command(flatten)]
        access: Access,
    },
    /// The authority that vouches for the region's daemons to each other.
    #[command(subcommand)]
    Authority(Authority),
}

#[derive(Subcommand)]
enum Account {
    /// Creates an account with its default network and prints its keys, which are shown only here.
    Create {
        /// Prints one JSON object.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        operator: Operator,
    },
}

/// Where operators ask.
#[derive(Args)]
pub struct Operator {
    /// The socket admin.sock in the state folder of the control plane.
    #[arg(long, env = "CARDINAL_ADMIN_SOCKET", default_value = "/var/lib/cardinal/control/admin.sock")]
    admin_socket: PathBuf,
}

impl Operator {
    /// Asks, and gives the answer while it comes in.
    fn post(&self, path: &str, body: &str) -> Result<client::Stream> {
        client::post_to_socket(&self.admin_socket, path, body)
            .with_context(|| format!("asking the control plane at {}", self.admin_socket.display()))
    }

    /// Asks for one JSON document.
    fn ask(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.post(path, &body.to_string())?.text()?;
        if answer.is_error() {
            let error: Value = serde_json::from_str(&answer.body).unwrap_or_default();
            bail!("the control plane refused: {}", error.pointer("/error/message").and_then(Value::as_str).unwrap_or(answer.body.trim()));
        }
        serde_json::from_str(&answer.body).context("the control plane's answer is not JSON")
    }
}

#[derive(Subcommand)]
enum Authority {
    /// Makes ca.pem and ca.key in a folder.
    Init {
        /// The folder; it is created.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Makes NAME.pem and NAME.key, signed by the authority in the folder.
    Issue {
        /// The folder of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// The DNS name that the certificate vouches for: control, or the id of a card.
        #[arg(long)]
        name: String,
    },
}

#[derive(Args)]
struct Access {
    /// Where the API listens.
    #[arg(long, env = "AWS_ENDPOINT_URL", default_value = "http://127.0.0.1:8080")]
    endpoint: String,
    /// The public half of the credentials.
    #[arg(long, env = "AWS_ACCESS_KEY_ID")]
    access_key: String,
    /// The secret half.
    #[arg(long, env = "AWS_SECRET_ACCESS_KEY", hide_env_values = true)]
    secret_key: String,
    /// The region that the signature names.
    #[arg(long, env = "AWS_REGION", default_value = "us-east-1")]
    region: String,
}

impl Access {
    fn endpoint(self, service: &str) -> Result<Endpoint> {
        let signer = sigv4::Signer {
            access_key_id: self.access_key,
            secret_access_key: self.secret_key,
            region: self.region,
            service: service.to_owned(),
        };
        Endpoint::new(&self.endpoint, signer)
    }
}

fn main() -> ExitCode {
    run(Arguments::parse().command).unwrap_or_else(|error| {
        eprintln!("cardinal: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Account(Account::Create { json, operator }) => {
            let account = operator.ask("/accounts", &Value::Null)?;
            if json {
                writeln!(std::io::stdout(), "{account}")?;
                return Ok(ExitCode::SUCCESS);
            }
            for name in ["account_id", "access_key_id", "secret_access_key"] {
                let value = account.get(name).and_then(Value::as_str).with_context(|| format!("the answer lacks {name}"))?;
                writeln!(std::io::stdout(), "{name} {value}")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Packet(packet) => packet::run(packet),
        Command::Call { action, parameters, access } => {
            let (service, version) = match action.as_str() {
                "GetCallerIdentity" => ("sts", "2011-06-15"),
                _ => ("ec2", "2016-11-15"),
            };
            let mut form = format!("Action={}&Version={version}", sigv4::encode(action.as_bytes()));
            for parameter in &parameters {
                let pair = parameter.split_once('=');
                let (name, value) = pair.with_context(|| format!("{parameter} is not of the form Name=Value"))?;
                form = format!("{form}&{}={}", sigv4::encode(name.as_bytes()), sigv4::encode(value.as_bytes()));
            }
            let endpoint = access.endpoint(service)?;
            print(&endpoint.send("POST", "/", "application/x-www-form-urlencoded; charset=utf-8", form)?)
        }
        Command::Rest { method, path, body, access } => {
            let endpoint = access.endpoint("execute-api")?;
            print(&endpoint.send(&method.to_uppercase(), &path, "application/json", body.unwrap_or_default())?)
        }
        Command::Authority(Authority::Init { dir }) => authority::init(&dir).map(|()| ExitCode::SUCCESS),
        Command::Authority(Authority::Issue { dir, name }) => authority::issue(&dir, &name).map(|()| ExitCode::SUCCESS),
    }
}

/// Prints what came, and fails the command when it was an error.
fn print(answer: &Answer) -> Result<ExitCode> {
    writeln!(std::io::stdout(), "{}", answer.body.trim_end())?;
    if answer.is_error() {
        eprintln!("HTTP {}", answer.status);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
