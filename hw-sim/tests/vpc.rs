//! A VPC as a tenant draws it: a public and a private subnet, a NAT gateway between
//! the private one and the internet, a network ACL at its border, a peered VPC
//! beside it, and names for its addresses.

use std::time::Duration;

use hw_sim::{Instance, Region, root_or_skip};

/// A host on the internet, behind the gateway of the public network.
const FAR_HOST: &str = "203.0.113.10";

/// A VPC of the test with its subnets.
struct Vpc {
    id: String,
    public: String,
    private: String,
    private_table: String,
    group: String,
}

/// 10.9.0.0/16: a public subnet with an internet gateway, and a private one in
/// another zone whose table leads nowhere yet. Its group lets everything in.
fn draw(region: &Region, zones: &[String]) -> Vpc {
    let vpc = region.call("CreateVpc", &[("CidrBlock", "10.9.0.0/16")]).need("vpcId");
    let subnet = |block: &str, zone: &str| {
        region.call("CreateSubnet", &[("VpcId", &vpc), ("CidrBlock", block), ("AvailabilityZone", zone)]).need("subnetId")
    };
    let (public, private) = (subnet("10.9.1.0/24", &zones[0]), subnet("10.9.2.0/24", &zones[1]));
    let _ = region.call("ModifySubnetAttribute", &[("SubnetId", &public), ("MapPublicIpOnLaunch.Value", "true")]);
    let gateway = region.call("CreateInternetGateway", &[]).need("internetGatewayId");
    let _ = region.call("AttachInternetGateway", &[("InternetGatewayId", &gateway), ("VpcId", &vpc)]);
    let table = |subnet: &str| {
        let table = region.call("CreateRouteTable", &[("VpcId", &vpc)]).need("routeTableId");
        let _ = region.call("AssociateRouteTable", &[("RouteTableId", &table), ("SubnetId", subnet)]);
        table
    };
    let (public_table, private_table) = (table(&public), table(&private));
    let _ = region.call("CreateRoute", &[("RouteTableId", &public_table), ("DestinationCidrBlock", "0.0.0.0/0"), ("GatewayId", &gateway)]);
    let group = open_group(region, &vpc);
    Vpc { id: vpc, public, private, private_table, group }
}

/// A security group of a VPC that lets everything in.
fn open_group(region: &Region, vpc: &str) -> String {
    let create = [("GroupName", "open"), ("GroupDescription", "everything"), ("VpcId", vpc)];
    let group = region.call("CreateSecurityGroup", &create).need("groupId");
    let _ = region.call(
        "AuthorizeSecurityGroupIngress",
        &[("GroupId", &group), ("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0")],
    );
    group
}

fn launch(region: &Region, subnet: &str, group: &str) -> Instance {
    region.launch(&[("SubnetId", subnet), ("SecurityGroupId.1", group), ("KeyName", "rack")])
}

#[test]
fn private_subnets_reach_out_by_nat_alone_and_acls_and_peers_hold() {
    if !root_or_skip("vpc") {
        return;
    }
    let region = Region::start("vpc", &["--zones", "2"]);
    let zones = region.call("DescribeAvailabilityZones", &[]).all("zoneName");
    let vpc = draw(&region, &zones);
    let bastion = launch(&region, &vpc.public, &vpc.group);
    let inner = launch(&region, &vpc.private, &vpc.group);
    assert_eq!(inner.public_address, "", "a private subnet gives no public address");
    region.wait_ssh(&bastion, 60);
    region.eventually("the private guest lets the bastion in", 60, || region.try_ssh_through(&bastion, &inner, "true").0);

    names(&region, &bastion, &inner);
    nat_gateway(&region, &vpc, &bastion, &inner);
    network_acl(&region, &vpc, &bastion, &inner);
    region.terminate(&[&inner.id]);
    peering(&region, &vpc, &bastion, &zones[1]);
    region.terminate(&[&bastion.id]);
}

/// The resolver of the VPC knows its private addresses by name and back.
fn names(region: &Region, bastion: &Instance, inner: &Instance) {
    let name = format!("ip-{}.ec2.internal", inner.private_address.replace('.', "-"));
    let found = region.ssh(bastion, &format!("nslookup {name}"));
    assert!(found.contains(&inner.private_address), "{name} is not {}: {found}", inner.private_address);
    let found = region.ssh(bastion, &format!("nslookup {}", inner.private_address));
    assert!(found.contains(&name), "{} is not {name}: {found}", inner.private_address);
    assert!(!region.try_ssh(bastion, "nslookup ip-10-200-0-1.ec2.internal").0, "an address of no VPC has a name");
}

fn nat_gateway(region: &Region, vpc: &Vpc, bastion: &Instance, inner: &Instance) {
    let reaches = || region.try_ssh_through(bastion, inner, &format!("ping -c 2 -i 0.3 -W 1 {FAR_HOST}")).0;
    assert!(!reaches(), "a private subnet without a route reached the internet");
    let address = region.call("AllocateAddress", &[("Domain", "vpc")]);
    let (allocation, public) = (address.need("allocationId"), address.need("publicIp"));
    let nat = region.call("CreateNatGateway", &[("SubnetId", &vpc.public), ("AllocationId", &allocation)]).need("natGatewayId");
    let state = || region.call("DescribeNatGateways", &[("NatGatewayId.1", &nat)]).need("state");
    region.eventually("the NAT gateway is available", 20, || state() == "available");
    let route = [("RouteTableId", vpc.private_table.as_str()), ("DestinationCidrBlock", "0.0.0.0/0"), ("NatGatewayId", &nat)];
    let _ = region.call("CreateRoute", &route);
    region.eventually("the private guest reaches the internet by NAT", 10, reaches);

    // Who looks from the internet sees the gateway's address, and gets no further by it.
    let server =
        "import socket;s=socket.create_server(('203.0.113.10',7000));s.settimeout(20);c,a=s.accept();c.sendall(a[0].encode());c.close()";
    let listen = std::process::Command::new("ip")
        .args(["netns", "exec", region.ready("internet_namespace").as_str().expect("namespace"), "python3", "-c", server])
        .spawn();
    let mut listen = listen.expect("python3");
    let seen = || region.try_ssh_through(bastion, inner, &format!("nc -w 5 {FAR_HOST} 7000 </dev/null")).1;
    let mut answer = String::new();
    region.eventually("TCP passes the NAT gateway", 15, || {
        answer = seen();
        !answer.is_empty()
    });
    let _ = listen.wait();
    assert_eq!(answer, public, "the connection came from another address");
    let greeted = |address: &str| {
        let probe = format!("exec 3<>/dev/tcp/{address}/22 && head -c 4 <&3");
        region.on_internet(&["timeout", "2", "bash", "-c", &probe]).stdout == b"SSH-"
    };
    assert!(greeted(&bastion.public_address), "the probe finds no sshd where there is one");
    assert!(!greeted(&public), "the NAT gateway let a stranger in");

    // While it is used it cannot lose its address; without it the guest is cut off.
    let association = region.call("DescribeAddresses", &[("AllocationId.1", &allocation)]).need("associationId");
    let _ = region.refusal("DisassociateAddress", &[("AssociationId", &association)]);
    let _ = region.call("DeleteNatGateway", &[("NatGatewayId", &nat)]);
    region.eventually("the NAT gateway is gone", 20, || state() == "deleted");
    assert!(!reaches(), "the guest reaches the internet by a NAT gateway that is gone");
    let tables = region.call("DescribeRouteTables", &[("RouteTableId.1", &vpc.private_table)]);
    assert!(tables.all("state").contains(&"blackhole".to_owned()), "the route to it is no black hole: {}", tables.0);
    let _ = region.call("ReleaseAddress", &[("AllocationId", &allocation)]);
}

/// Entries count in the order of their numbers, on every packet that crosses the
/// subnet's border, also on connections that were open before.
fn network_acl(region: &Region, vpc: &Vpc, bastion: &Instance, inner: &Instance) {
    let pings = || region.pings(bastion, &inner.private_address);
    assert!(pings());
    let acl = region.call("CreateNetworkAcl", &[("VpcId", &vpc.id)]).need("networkAclId");
    let entry = |number: &str, action: &str, egress: &str, block: &str| {
        let entry = [
            ("NetworkAclId", acl.as_str()),
            ("RuleNumber", number),
            ("Protocol", "-1"),
            ("RuleAction", action),
            ("Egress", egress),
            ("CidrBlock", block),
        ];
        let _ = region.call("CreateNetworkAclEntry", &entry);
    };
    entry("100", "allow", "false", "0.0.0.0/0");
    entry("100", "allow", "true", "0.0.0.0/0");
    let of_subnet = [("Filter.1.Name", "association.subnet-id"), ("Filter.1.Value.1", vpc.private.as_str())];
    let before = region.call("DescribeNetworkAcls", &of_subnet);
    let association =
        before.all("networkAclAssociationId").into_iter().zip(before.all("subnetId")).find(|(_, subnet)| *subnet == vpc.private);
    let association = association.expect("an association").0;
    let _ = region.call("ReplaceNetworkAclAssociation", &[("AssociationId", &association), ("NetworkAclId", &acl)]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(pings(), "an ACL that allows everything cut the subnet off");

    // A tracked connection does not outlive a deny: the ACL knows no connections.
    let mut open = region.ssh_command(bastion);
    let talk = format!("(echo one; sleep 5; echo two; sleep 1) | timeout 9 nc {} 7100", inner.private_address);
    let _ = region.try_ssh_through(bastion, inner, "setsid sh -c 'nc -l -p 7100 -e cat' >/dev/null 2>&1 & sleep 0.3");
    let open = open.arg(talk).stdout(std::process::Stdio::piped()).spawn().expect("ssh");
    std::thread::sleep(Duration::from_secs(2));
    let host = format!("{}/32", bastion.private_address);
    entry("90", "deny", "false", &host);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!pings(), "a deny with a lower number did not win");
    let output = open.wait_with_output().expect("ssh");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "one\n", "an open connection outlived the deny");
    let card = region.card_of(&inner.id);
    assert!(region.card_metric(&card, &["drop", "acl"]) > 0.0, "the denied packets were not counted");

    let _ = region.call("DeleteNetworkAclEntry", &[("NetworkAclId", &acl), ("RuleNumber", "90"), ("Egress", "false")]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(pings(), "the subnet is cut off after the deny went");
    // Stateless: without an egress entry the answers do not leave.
    let _ = region.call("DeleteNetworkAclEntry", &[("NetworkAclId", &acl), ("RuleNumber", "100"), ("Egress", "true")]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!pings(), "answers left a subnet whose ACL lets nothing out");
}

fn peering(region: &Region, vpc: &Vpc, bastion: &Instance, zone: &str) {
    let other = region.call("CreateVpc", &[("CidrBlock", "10.10.0.0/16")]).need("vpcId");
    let create = [("VpcId", other.as_str()), ("CidrBlock", "10.10.1.0/24"), ("AvailabilityZone", zone)];
    let subnet = region.call("CreateSubnet", &create).need("subnetId");
    let group = open_group(region, &other);
    let peer = launch(region, &subnet, &group);
    region.eventually("the peer is up", 60, || region.console(&peer.id).contains("mini: sshd"));
    assert!(!region.pings(bastion, &peer.private_address), "a guest of a VPC that is no peer answered");

    let peering = region.call("CreateVpcPeeringConnection", &[("VpcId", &vpc.id), ("PeerVpcId", &other)]).need("vpcPeeringConnectionId");
    let _ = region.call("AcceptVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]);
    let table = |subnet: &str, vpc: &str| {
        let of_subnet = [("Filter.1.Name", "association.subnet-id"), ("Filter.1.Value.1", subnet)];
        let own = region.call("DescribeRouteTables", &of_subnet).first("routeTableId");
        let main = [("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", vpc)];
        own.unwrap_or_else(|| region.call("DescribeRouteTables", &main).need("routeTableId"))
    };
    let route = |table: &str, block: &str| {
        let route = [("RouteTableId", table), ("DestinationCidrBlock", block), ("VpcPeeringConnectionId", &peering)];
        let _ = region.call("CreateRoute", &route);
    };
    route(&table(&vpc.public, &vpc.id), "10.10.0.0/16");
    std::thread::sleep(Duration::from_secs(1));
    assert!(!region.pings(bastion, &peer.private_address), "answers found a way back without a route");
    route(&table(&subnet, &other), "10.9.0.0/16");
    region.eventually("peers reach each other", 5, || region.pings(bastion, &peer.private_address));
    let _ = region.call("DeleteVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!region.pings(bastion, &peer.private_address), "former peers reach each other");
    region.terminate(&[&peer.id]);
}
