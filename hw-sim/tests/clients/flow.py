"""The story of `cargo rack demo`, told by an unmodified boto3.

Arguments: the login key, the namespace of the internet side. The endpoint and
the credentials come from the environment, as for any boto3 program.
"""

import subprocess
import sys
import time

import boto3
from botocore.exceptions import ClientError

KEY, NAMESPACE = sys.argv[1:3]
ec2 = boto3.client("ec2")
BEGUN = time.monotonic()


def say(what):
    print(f"{time.monotonic() - BEGUN:6.1f} s  boto3: {what}", flush=True)


def ssh(address, command, wait=60):
    line = ["ip", "netns", "exec", NAMESPACE, "ssh", "-q", "-i", KEY, "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=3", "-o", "BatchMode=yes", f"ec2-user@{address}"]
    deadline = time.monotonic() + wait
    while subprocess.run(line + ["true"], stdin=subprocess.DEVNULL).returncode != 0:
        assert time.monotonic() < deadline, f"no login at {address}"
        time.sleep(0.2)
    return subprocess.run(line + [command], stdin=subprocess.DEVNULL, capture_output=True, text=True)


def address_of(instance, kind="PublicIpAddress"):
    return ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0][kind]


def waiter(name, **arguments):
    ec2.get_waiter(name).wait(WaiterConfig={"Delay": 1, "MaxAttempts": 60}, **arguments)


identity = boto3.client("sts").get_caller_identity()
say(f"account {identity['Account']}")
image = ec2.describe_images(Owners=["amazon"], Filters=[{"Name": "name", "Values": ["mini"]}])["Images"][0]["ImageId"]
zones = [zone["ZoneName"] for zone in ec2.describe_availability_zones()["AvailabilityZones"]]


def launch(zone, instance_type="t3.micro"):
    answer = ec2.run_instances(ImageId=image, InstanceType=instance_type, MinCount=1, MaxCount=1, KeyName="rack",
                               SecurityGroups=["rack"], Placement={"AvailabilityZone": zone},
                               TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "flow"}]}])
    instance = answer["Instances"][0]["InstanceId"]
    assert answer["Instances"][0]["State"]["Name"] == "pending"
    waiter("instance_running", InstanceIds=[instance])
    return instance


first, second = launch(zones[0]), launch(zones[-1])
say(f"{first} and {second} run")
tagged = ec2.describe_instances(Filters=[{"Name": "tag:Name", "Values": ["fl*"]}, {"Name": "instance-state-name", "Values": ["running"]}])
assert len([i for r in tagged["Reservations"] for i in r["Instances"]]) == 2

target = address_of(second, "PrivateIpAddress")
assert ssh(address_of(first), f"ping -c 3 -i 0.2 -W 2 {target}").returncode == 0
say("ping inside the VPC")

group = ec2.create_security_group(GroupName="boto3", Description="boto3")["GroupId"]
rack = ec2.describe_security_groups(GroupNames=["rack"])["SecurityGroups"][0]["GroupId"]
ec2.modify_instance_attribute(InstanceId=second, Groups=[rack, group])
ssh(address_of(second), "setsid sh -c 'while :; do echo hello | nc -l -p 8080; done' >/dev/null 2>&1 &")
probe = f"nc -w 1 {target} 8080 </dev/null | grep -q hello && echo open || echo closed"
permission = [{"IpProtocol": "tcp", "FromPort": 8080, "ToPort": 8080, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]


def until(wanted):
    deadline = time.monotonic() + 20
    while ssh(address_of(first), probe).stdout.strip() != wanted:
        assert time.monotonic() < deadline, f"tcp/8080 is not {wanted}"


until("closed")
ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=permission)
until("open")
ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=permission)
until("closed")
say("security group opened and closed")

volume = ec2.create_volume(AvailabilityZone=zones[0], Size=1, VolumeType="gp3")["VolumeId"]
waiter("volume_available", VolumeIds=[volume])
ec2.attach_volume(InstanceId=first, VolumeId=volume, Device="/dev/sdf")
waiter("volume_in_use", VolumeIds=[volume])
written = ssh(address_of(first), "until test -b /dev/vdb; do sleep 0.2; done; echo payload | sudo dd of=/dev/vdb conv=fsync 2>/dev/null; sudo head -c 8 /dev/vdb")
assert written.stdout == "payload\n", written
ec2.detach_volume(VolumeId=volume)
waiter("volume_available", VolumeIds=[volume])
ec2.delete_volume(VolumeId=volume)
waiter("volume_deleted", VolumeIds=[volume])
say("volume attached, written, detached, deleted")

ec2.stop_instances(InstanceIds=[second])
waiter("instance_stopped", InstanceIds=[second])
ec2.modify_instance_attribute(InstanceId=second, InstanceType={"Value": "t3.small"})
ec2.start_instances(InstanceIds=[second])
waiter("instance_running", InstanceIds=[second])
memory = int(ssh(address_of(second), "awk '/MemTotal/ { print $2 }' /proc/meminfo").stdout)
assert 1_500_000 < memory <= 2_097_152, memory
say("stopped, resized, started")

output = ec2.get_console_output(InstanceId=first)["Output"]
assert "mini: sshd" in output, output
for call in (lambda: ec2.describe_instances(InstanceIds=["i-00000000000000000"]), lambda: ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, DryRun=True)):
    try:
        call()
        raise AssertionError("accepted")
    except ClientError as error:
        assert error.response["Error"]["Code"] in ("InvalidInstanceID.NotFound", "DryRunOperation"), error

ec2.terminate_instances(InstanceIds=[first, second])
waiter("instance_terminated", InstanceIds=[first, second])
ec2.delete_security_group(GroupId=group)
say("the end")
