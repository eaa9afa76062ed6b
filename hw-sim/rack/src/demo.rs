//! The story of a region, told on a running one, with timings.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::tenant::{Tenant, login};

const TYPE: &str = "t3.micro";
const RESIZED: &str = "t3.small";

/// `cargo rack demo`.
pub fn run(dir: &Path) -> Result<ExitCode> {
    let tenant = Tenant::at(dir)?;
    let mut story =
        Story { dir, tenant: &tenant, begun: Instant::now(), instances: Vec::new(), volumes: Vec::new(), groups: Vec::new(), vpc: None };
    let told = story.tell();
    let cleaned = story.clean_up();
    told?;
    cleaned?;
    println!("{:>6.1} s  the end; everything that the demo made is gone", story.begun.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

struct Story<'a> {
    dir: &'a Path,
    tenant: &'a Tenant,
    begun: Instant,
    instances: Vec<String>,
    volumes: Vec<String>,
    groups: Vec<String>,
    vpc: Option<Vpc>,
}

/// A second network with the addresses of the first.
struct Vpc {
    id: String,
    subnet: String,
    gateway: String,
}

impl Story<'_> {
    fn tell(&mut self) -> Result<()> {
        let tenant = self.tenant;
        let image = tenant.images()?.remove("mini").context("this region has no image mini")?;
        let zones = tenant.call("DescribeAvailabilityZones", &[])?.all("zoneName");
        let (Some(first_zone), Some(last_zone)) = (zones.first(), zones.last()) else { bail!("no zones") };

        self.say("launch two guests, on cards of two zones if there are two");
        let first = self.launch(&image, &[("Placement.AvailabilityZone", first_zone)])?;
        let second = self.launch(&image, &[("Placement.AvailabilityZone", last_zone)])?;
        let uptime = self.on(&first, "cat /proc/uptime")?;
        self.say(&format!("{first} answers ssh, {} s after its kernel began", uptime.split(' ').next().unwrap_or_default()));
        self.on(&second, "true")?;
        self.say(&format!("{second} answers ssh"));

        let address = self.private_address(&second)?;
        self.on(&first, &format!("ping -c 3 -i 0.2 -W 2 {address}"))?;
        self.say(&format!("ping inside the VPC: {first} reaches {address}"));

        self.security_group(&first, &second, &address)?;
        self.volume(&first, first_zone)?;
        self.stop_resize_start(&second)?;

        tenant.call("TerminateInstances", &[("InstanceId.1", &second)])?;
        tenant.wait(&second, "terminated", Duration::from_secs(40))?;
        self.say(&format!("{second} terminated"));
        self.other_vpc(&image, &first, &address)
    }

    /// A port that is closed opens with a rule and closes with its removal.
    fn security_group(&mut self, first: &str, second: &str, address: &str) -> Result<()> {
        let tenant = self.tenant;
        let group = tenant.call("CreateSecurityGroup", &[("GroupName", "demo"), ("GroupDescription", "demo")])?.need("groupId")?;
        self.groups.push(group.clone());
        let rack = tenant.call("DescribeSecurityGroups", &[("GroupName.1", "rack")])?.need("groupId")?;
        tenant.call("ModifyInstanceAttribute", &[("InstanceId", second), ("GroupId.1", &rack), ("GroupId.2", &group)])?;
        self.on(second, "setsid sh -c 'while :; do echo hello | nc -l -p 8080; done' >/dev/null 2>&1 &")?;
        let probe = format!("nc -w 1 {address} 8080 </dev/null | grep -q hello && echo open || echo closed");
        let rule = [
            ("GroupId", group.as_str()),
            ("IpPermissions.1.IpProtocol", "tcp"),
            ("IpPermissions.1.FromPort", "8080"),
            ("IpPermissions.1.ToPort", "8080"),
            ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
        ];
        self.expect(first, &probe, "closed")?;
        tenant.call("AuthorizeSecurityGroupIngress", &rule)?;
        let took = self.until(first, &probe, "open")?;
        self.say(&format!("security group: tcp/8080 opened, seen in the guest after {took:.1} s"));
        tenant.call("RevokeSecurityGroupIngress", &rule)?;
        let took = self.until(first, &probe, "closed")?;
        self.say(&format!("security group: tcp/8080 closed again after {took:.1} s"));
        Ok(())
    }

    /// A volume is written in one guest and read in another.
    fn volume(&mut self, first: &str, zone: &str) -> Result<()> {
        let tenant = self.tenant;
        let volume = tenant.call("CreateVolume", &[("AvailabilityZone", zone), ("Size", "1"), ("VolumeType", "gp3")])?.need("volumeId")?;
        self.volumes.push(volume.clone());
        self.wait_volume(&volume, "available")?;
        self.attach(first, &volume)?;
        let disk = "/dev/vdb";
        self.until(first, &format!("test -b {disk} && echo there"), "there")?;
        self.on(first, &format!("sudo mkfs.ext4 -q {disk} && sudo mkdir -p /data && sudo mount {disk} /data && sudo dd if=/dev/urandom of=/data/file bs=64k count=16 2>/dev/null && sync"))?;
        let written = self.on(first, "sudo sha256sum /data/file")?;
        self.on(first, "sudo umount /data")?;
        tenant.call("DetachVolume", &[("VolumeId", &volume)])?;
        self.wait_volume(&volume, "available")?;
        self.say(&format!("{volume} attached to {first}, formatted, written, detached"));

        // Another guest of the zone; on another card when the zone has two.
        let image = tenant.images()?.remove("mini").context("no image mini")?;
        let reader = self.launch(&image, &[("Placement.AvailabilityZone", zone)])?;
        self.attach(&reader, &volume)?;
        self.until(&reader, &format!("test -b {disk} && echo there"), "there")?;
        let read =
            self.on(&reader, &format!("sudo mkdir -p /data && sudo mount {disk} /data && sudo sha256sum /data/file && sudo umount /data"))?;
        if written != read {
            bail!("{volume} has {read} where {written} was written");
        }
        self.say(&format!("{volume} read in {reader}: the same hash"));
        tenant.call("DetachVolume", &[("VolumeId", &volume)])?;
        self.wait_volume(&volume, "available")?;
        tenant.call("TerminateInstances", &[("InstanceId.1", &reader)])?;
        tenant.wait(&reader, "terminated", Duration::from_secs(40))?;
        Ok(())
    }

    fn stop_resize_start(&mut self, instance: &str) -> Result<()> {
        let tenant = self.tenant;
        let before = self.on(instance, "grep MemTotal /proc/meminfo")?;
        tenant.call("StopInstances", &[("InstanceId.1", instance)])?;
        let took = tenant.wait(instance, "stopped", Duration::from_secs(40))?;
        self.say(&format!("{instance} stopped in {:.1} s", took.as_secs_f64()));
        tenant.call("ModifyInstanceAttribute", &[("InstanceId", instance), ("InstanceType.Value", RESIZED)])?;
        tenant.call("StartInstances", &[("InstanceId.1", instance)])?;
        tenant.wait(instance, "running", Duration::from_secs(40))?;
        let after = self.on(instance, "grep MemTotal /proc/meminfo")?;
        if before == after {
            bail!("{instance} kept its memory: {after}");
        }
        self.say(&format!("{instance} started as {RESIZED}: {before} became {after}"));
        Ok(())
    }

    /// The same addresses in another VPC are somebody else's.
    fn other_vpc(&mut self, image: &str, first: &str, address: &str) -> Result<()> {
        let tenant = self.tenant;
        let zone = tenant.call("DescribeAvailabilityZones", &[])?.all("zoneName").pop().context("no zone")?;
        let here = [("Filter.1.Name", "availability-zone"), ("Filter.1.Value.1", zone.as_str())];
        let block = tenant.call("DescribeSubnets", &here)?.need("cidrBlock")?;
        let vpc = tenant.call("CreateVpc", &[("CidrBlock", "172.31.0.0/16")])?.need("vpcId")?;
        let subnet =
            tenant.call("CreateSubnet", &[("VpcId", &vpc), ("CidrBlock", &block), ("AvailabilityZone", &zone)])?.need("subnetId")?;
        let gateway = tenant.call("CreateInternetGateway", &[])?.need("internetGatewayId")?;
        tenant.call("AttachInternetGateway", &[("InternetGatewayId", &gateway), ("VpcId", &vpc)])?;
        self.vpc = Some(Vpc { id: vpc, subnet: subnet.clone(), gateway });
        let twin = tenant
            .call(
                "RunInstances",
                &[
                    ("ImageId", image),
                    ("InstanceType", TYPE),
                    ("MinCount", "1"),
                    ("MaxCount", "1"),
                    ("SubnetId", &subnet),
                    ("PrivateIpAddress", address),
                ],
            )?
            .need("instanceId")?;
        self.instances.push(twin.clone());
        tenant.wait(&twin, "running", Duration::from_secs(40))?;
        self.expect(first, &format!("ping -c 3 -i 0.2 -W 1 {address} >/dev/null && echo reached || echo silent"), "silent")?;
        self.say(&format!("{twin} has {address} in another VPC: {first} cannot reach it"));
        Ok(())
    }

    fn launch(&mut self, image: &str, more: &[(&str, &str)]) -> Result<String> {
        let mut parameters = vec![
            ("ImageId", image),
            ("InstanceType", TYPE),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("KeyName", "rack"),
            ("SecurityGroup.1", "rack"),
        ];
        parameters.extend(more);
        let begun = Instant::now();
        let id = self.tenant.call("RunInstances", &parameters)?.need("instanceId")?;
        self.instances.push(id.clone());
        let accepted = begun.elapsed();
        self.tenant.wait(&id, "running", Duration::from_secs(40))?;
        self.say(&format!("{id} accepted in {} ms, running after {:.1} s", accepted.as_millis(), begun.elapsed().as_secs_f64()));
        Ok(id)
    }

    fn attach(&self, instance: &str, volume: &str) -> Result<()> {
        self.tenant.call("AttachVolume", &[("InstanceId", instance), ("VolumeId", volume), ("Device", "/dev/sdf")])?;
        self.wait_volume(volume, "in-use")
    }

    fn wait_volume(&self, volume: &str, state: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = self.tenant.call("DescribeVolumes", &[("VolumeId.1", volume)])?;
            let attachment = answer.within("attachmentSet", "status");
            if answer.all("status").contains(&state.to_owned()) && attachment.is_none_or(|status| status == "attached") {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{volume} is not {state} after 30 s");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn private_address(&self, instance: &str) -> Result<String> {
        self.tenant.call("DescribeInstances", &[("InstanceId.1", instance)])?.need("privateIpAddress")
    }

    /// Runs a command in a guest by ssh and returns what it printed.
    fn on(&self, instance: &str, command: &str) -> Result<String> {
        let output = login(self.dir, self.tenant, instance, 60)?.arg(command).output()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() {
            bail!("in {instance}: {command}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(text)
    }

    fn expect(&self, instance: &str, command: &str, wanted: &str) -> Result<()> {
        let got = self.on(instance, command)?;
        if got != wanted {
            bail!("in {instance}: {command} says {got:?} instead of {wanted:?}");
        }
        Ok(())
    }

    /// Seconds until a command prints `wanted`.
    fn until(&self, instance: &str, command: &str, wanted: &str) -> Result<f64> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            if self.on(instance, &format!("{command} || true"))? == wanted {
                return Ok(begun.elapsed().as_secs_f64());
            }
        }
        bail!("in {instance}: {command} does not say {wanted:?} within 20 s")
    }

    fn say(&self, what: &str) {
        println!("{:>6.1} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    /// Takes back all that the story made, also after a failure in its middle.
    fn clean_up(&mut self) -> Result<()> {
        let tenant = self.tenant;
        let mut last = Ok(());
        let mut note = |result: Result<()>| {
            if result.is_err() {
                last = result;
            }
        };
        for instance in &self.instances {
            note(tenant.call("TerminateInstances", &[("InstanceId.1", instance)]).map(|_| ()));
        }
        for instance in &self.instances {
            note(tenant.wait(instance, "terminated", Duration::from_secs(60)).map(|_| ()));
        }
        for volume in &self.volumes {
            note(self.wait_volume(volume, "available").and_then(|()| tenant.call("DeleteVolume", &[("VolumeId", volume)]).map(|_| ())));
        }
        for group in &self.groups {
            note(tenant.call("DeleteSecurityGroup", &[("GroupId", group)]).map(|_| ()));
        }
        if let Some(vpc) = &self.vpc {
            note(tenant.call("DeleteSubnet", &[("SubnetId", &vpc.subnet)]).map(|_| ()));
            note(tenant.call("DetachInternetGateway", &[("InternetGatewayId", &vpc.gateway), ("VpcId", &vpc.id)]).map(|_| ()));
            note(tenant.call("DeleteInternetGateway", &[("InternetGatewayId", &vpc.gateway)]).map(|_| ()));
            note(tenant.call("DeleteVpc", &[("VpcId", &vpc.id)]).map(|_| ()));
        }
        last
    }
}
