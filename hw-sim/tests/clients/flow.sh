#!/bin/bash
# The story of `cargo rack demo`, told by an unmodified awscli.
# Arguments: the login key, the namespace of the internet side.
set -eu -o pipefail
key=$1 namespace=$2
say() { printf '%6d s  awscli: %s\n' "$SECONDS" "$*"; }
query() { local filter=$1; shift; aws ec2 "$@" --query "$filter" --output text; }
guest() {
    local address=$1; shift
    ip netns exec "$namespace" ssh -q -i "$key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o ConnectTimeout=2 -o ServerAliveInterval=3 -o BatchMode=yes "ec2-user@$address" "$@" </dev/null
}
login() {
    local tries=0
    until guest "$1" true; do tries=$((tries + 1)); [ $tries -lt 100 ]; sleep 0.3; done
}
until_volume() {
    local tries=0
    until [ "$(query 'Volumes[0].State' describe-volumes --volume-ids "$1")" = "$2" ]; do tries=$((tries + 1)); [ $tries -lt 40 ]; sleep 0.3; done
}
until_instance() {
    local tries=0
    until [ "$(query 'Reservations[0].Instances[0].State.Name' describe-instances --instance-ids "$1")" = "$2" ]; do tries=$((tries + 1)); [ $tries -lt 60 ]; sleep 0.3; done
}
public() { query 'Reservations[0].Instances[0].PublicIpAddress' describe-instances --instance-ids "$1"; }

aws sts get-caller-identity --query Account --output text
image=$(query 'Images[0].ImageId' describe-images --owners amazon --filters Name=name,Values=mini)
zones=($(query 'AvailabilityZones[].ZoneName' describe-availability-zones))
launch() { query 'Instances[0].InstanceId' run-instances --image-id "$image" --instance-type t3.micro --key-name rack --security-groups rack --placement "AvailabilityZone=$1"; }
first=$(launch "${zones[0]}")
second=$(launch "${zones[-1]}")
until_instance "$first" running
until_instance "$second" running
one=$(public "$first") two=$(public "$second")
login "$one"; login "$two"
say "$first and $second answer ssh"

target=$(query 'Reservations[0].Instances[0].PrivateIpAddress' describe-instances --instance-ids "$second")
guest "$one" ping -c 3 -i 0.2 -W 2 "$target" >/dev/null
say "ping inside the VPC"

group=$(query GroupId create-security-group --group-name awscli --description awscli)
rack=$(query 'SecurityGroups[0].GroupId' describe-security-groups --group-names rack)
aws ec2 modify-instance-attribute --instance-id "$second" --groups "$rack" "$group"
guest "$two" "setsid sh -c 'while :; do echo hello | nc -l -p 8080; done' >/dev/null 2>&1 &"
port() { guest "$one" "nc -w 1 $target 8080 </dev/null | grep -q hello && echo open || echo closed"; }
until_port() { local tries=0; until [ "$(port)" = "$1" ]; do tries=$((tries + 1)); [ $tries -lt 20 ]; done; }
until_port closed
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 8080 --cidr 0.0.0.0/0 >/dev/null
until_port open
aws ec2 revoke-security-group-ingress --group-id "$group" --protocol tcp --port 8080 --cidr 0.0.0.0/0 >/dev/null
until_port closed
say "security group opened and closed"

volume=$(query VolumeId create-volume --availability-zone "${zones[0]}" --size 1 --volume-type gp3)
until_volume "$volume" available
aws ec2 attach-volume --instance-id "$first" --volume-id "$volume" --device /dev/sdf >/dev/null
until_volume "$volume" in-use
guest "$one" 'until test -b /dev/vdb; do sleep 0.2; done; echo payload | sudo dd of=/dev/vdb conv=fsync 2>/dev/null; sudo head -c 8 /dev/vdb' | grep -q payload
aws ec2 detach-volume --volume-id "$volume" >/dev/null
until_volume "$volume" available
aws ec2 delete-volume --volume-id "$volume"
say "volume attached, written, detached, deleted"

aws ec2 stop-instances --instance-ids "$second" >/dev/null
until_instance "$second" stopped
aws ec2 modify-instance-attribute --instance-id "$second" --instance-type Value=t3.small
aws ec2 start-instances --instance-ids "$second" >/dev/null
until_instance "$second" running
two=$(public "$second")
login "$two"
[ "$(guest "$two" "awk '/MemTotal/ { print \$2 }' /proc/meminfo")" -gt 1500000 ]
say "stopped, resized, started"

aws ec2 get-console-output --instance-id "$first" --query Output --output text | grep -q 'mini: sshd'
{ aws ec2 describe-instances --instance-ids i-00000000000000000 2>&1 || true; } | grep -q InvalidInstanceID.NotFound
aws ec2 terminate-instances --instance-ids "$first" "$second" >/dev/null
until_instance "$first" terminated
until_instance "$second" terminated
aws ec2 delete-security-group --group-id "$group" >/dev/null
say "the end"
