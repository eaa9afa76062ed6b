//! Acceptance 10: a second account sees, names and touches nothing of the first.

use hw_sim::{Region, root_or_skip};

/// An action, its parameters with `@` for the foreign id, and that id.
type Case<'a> = (&'a str, Vec<(&'a str, &'a str)>, &'a str);

#[test]
fn a_second_account_meets_every_foreign_id_as_an_unknown_one() {
    if !root_or_skip("account") {
        return;
    }
    let region = Region::start("account", &["--zones", "1", "--machine", "sim"]);
    let image = region.image("mini");
    let instance = region
        .call("RunInstances", &[("ImageId", &image), ("InstanceType", "t3.micro"), ("MinCount", "1"), ("MaxCount", "1")])
        .need("instanceId");
    region.wait_state(&instance, "running", 10);
    let one = |action: &str, name: &str| region.call(action, &[]).need(name);
    let vpc = one("DescribeVpcs", "vpcId");
    let subnet = one("DescribeSubnets", "subnetId");
    let table = one("DescribeRouteTables", "routeTableId");
    let gateway = one("DescribeInternetGateways", "internetGatewayId");
    let interface = one("DescribeNetworkInterfaces", "networkInterfaceId");
    let volume = one("DescribeVolumes", "volumeId");
    let group = region.call("DescribeSecurityGroups", &[("GroupName.1", "rack")]).need("groupId");
    let allocation = region.call("AllocateAddress", &[("Domain", "vpc")]).need("allocationId");
    let options = one("DescribeDhcpOptions", "dhcpOptionsId");
    let attachment = one("DescribeNetworkInterfaces", "attachmentId");
    let rule = region.call("DescribeSecurityGroupRules", &[("Filter.1.Name", "group-id"), ("Filter.1.Value.1", &group)]);
    let rule = rule.need("securityGroupRuleId");
    let list = [("PrefixListName", "offices"), ("AddressFamily", "IPv4"), ("MaxEntries", "2"), ("Entry.1.Cidr", "192.0.2.0/24")];
    let prefixes = region.call("CreateManagedPrefixList", &list).need("prefixListId");
    let acl = region.call("CreateNetworkAcl", &[("VpcId", &vpc)]).need("networkAclId");
    let filtered = one("DescribeNetworkAcls", "networkAclAssociationId");
    let nat = region.call("CreateNatGateway", &[("SubnetId", &subnet), ("AllocationId", &allocation)]).need("natGatewayId");
    let other_vpc = region.call("CreateVpc", &[("CidrBlock", "10.77.0.0/16")]).need("vpcId");
    let peering = region.call("CreateVpcPeeringConnection", &[("VpcId", &vpc), ("PeerVpcId", &other_vpc)]).need("vpcPeeringConnectionId");
    let stranger = region.account();
    let own = |action: &str, name: &str| region.try_call_as(&stranger, action, &[]).expect("an own list").need(name);
    let (own_vpc, own_subnet, own_table) =
        (own("DescribeVpcs", "vpcId"), own("DescribeSubnets", "subnetId"), own("DescribeRouteTables", "routeTableId"));

    // Lists: nothing of the first account; public images are for everybody.
    let list = |action: &str| region.try_call_as(&stranger, action, &[]).unwrap_or_else(|refusal| panic!("{action}: {refusal:?}")).0;
    for action in [
        "DescribeInstances",
        "DescribeVpcs",
        "DescribeSubnets",
        "DescribeRouteTables",
        "DescribeInternetGateways",
        "DescribeNetworkInterfaces",
        "DescribeVolumes",
        "DescribeSecurityGroups",
        "DescribeAddresses",
        "DescribeKeyPairs",
        "DescribeTags",
        "DescribeSecurityGroupRules",
        "DescribeNetworkAcls",
        "DescribeManagedPrefixLists",
        "DescribeDhcpOptions",
        "DescribeNatGateways",
        "DescribeVpcPeeringConnections",
    ] {
        let answer = list(action);
        let first = [&instance, &vpc, &subnet, &table, &gateway, &interface, &volume, &group, &allocation, &options, &attachment, &rule];
        for id in first.into_iter().chain([&prefixes, &acl, &nat, &peering]) {
            assert!(!answer.contains(id.as_str()), "{action} shows {id} to a stranger");
        }
    }

    // Calls: a foreign id answers exactly as an id that never was.
    let unknown = |id: &str| format!("{}-{}", id.rsplit_once('-').expect("an id").0, "0123456789abcdef0");
    let cases: Vec<Case<'_>> = vec![
        ("DescribeInstances", vec![("InstanceId.1", "@")], &instance),
        ("StartInstances", vec![("InstanceId.1", "@")], &instance),
        ("StopInstances", vec![("InstanceId.1", "@")], &instance),
        ("RebootInstances", vec![("InstanceId.1", "@")], &instance),
        ("TerminateInstances", vec![("InstanceId.1", "@")], &instance),
        ("ModifyInstanceAttribute", vec![("InstanceId", "@"), ("InstanceType.Value", "t3.small")], &instance),
        ("DescribeInstanceAttribute", vec![("InstanceId", "@"), ("Attribute", "userData")], &instance),
        ("DescribeInstanceStatus", vec![("InstanceId.1", "@")], &instance),
        ("GetConsoleOutput", vec![("InstanceId", "@")], &instance),
        ("CreateTags", vec![("ResourceId.1", "@"), ("Tag.1.Key", "k"), ("Tag.1.Value", "v")], &instance),
        ("AssociateAddress", vec![("AllocationId", "@"), ("InstanceId", "i-0123456789abcdef0")], &allocation),
        ("ReleaseAddress", vec![("AllocationId", "@")], &allocation),
        ("DescribeVolumes", vec![("VolumeId.1", "@")], &volume),
        ("AttachVolume", vec![("VolumeId", "@"), ("InstanceId", "i-0123456789abcdef0"), ("Device", "/dev/sdf")], &volume),
        ("DetachVolume", vec![("VolumeId", "@")], &volume),
        ("DeleteVolume", vec![("VolumeId", "@")], &volume),
        ("DescribeVpcs", vec![("VpcId.1", "@")], &vpc),
        ("DeleteVpc", vec![("VpcId", "@")], &vpc),
        ("CreateSubnet", vec![("VpcId", "@"), ("CidrBlock", "172.31.200.0/24")], &vpc),
        ("CreateRouteTable", vec![("VpcId", "@")], &vpc),
        ("CreateSecurityGroup", vec![("GroupName", "x"), ("GroupDescription", "x"), ("VpcId", "@")], &vpc),
        ("DescribeSubnets", vec![("SubnetId.1", "@")], &subnet),
        ("DeleteSubnet", vec![("SubnetId", "@")], &subnet),
        (
            "RunInstances",
            vec![("ImageId", &image), ("InstanceType", "t3.micro"), ("MinCount", "1"), ("MaxCount", "1"), ("SubnetId", "@")],
            &subnet,
        ),
        ("DescribeRouteTables", vec![("RouteTableId.1", "@")], &table),
        (
            "CreateRoute",
            vec![("RouteTableId", "@"), ("DestinationCidrBlock", "10.9.0.0/16"), ("GatewayId", "igw-0123456789abcdef0")],
            &table,
        ),
        ("DeleteRouteTable", vec![("RouteTableId", "@")], &table),
        ("DescribeInternetGateways", vec![("InternetGatewayId.1", "@")], &gateway),
        ("DetachInternetGateway", vec![("InternetGatewayId", "@"), ("VpcId", "vpc-0123456789abcdef0")], &gateway),
        ("DeleteInternetGateway", vec![("InternetGatewayId", "@")], &gateway),
        ("DescribeSecurityGroups", vec![("GroupId.1", "@")], &group),
        ("DeleteSecurityGroup", vec![("GroupId", "@")], &group),
        (
            "AuthorizeSecurityGroupIngress",
            vec![("GroupId", "@"), ("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0")],
            &group,
        ),
        (
            "RevokeSecurityGroupIngress",
            vec![("GroupId", "@"), ("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0")],
            &group,
        ),
        ("DescribeNetworkInterfaces", vec![("NetworkInterfaceId.1", "@")], &interface),
        ("CreateNetworkInterface", vec![("SubnetId", "@")], &subnet),
        ("DeleteNetworkInterface", vec![("NetworkInterfaceId", "@")], &interface),
        (
            "AttachNetworkInterface",
            vec![("NetworkInterfaceId", "@"), ("InstanceId", "i-0123456789abcdef0"), ("DeviceIndex", "1")],
            &interface,
        ),
        ("DetachNetworkInterface", vec![("AttachmentId", "@")], &attachment),
        ("ModifyNetworkInterfaceAttribute", vec![("NetworkInterfaceId", "@"), ("SourceDestCheck.Value", "false")], &interface),
        ("DescribeNetworkInterfaceAttribute", vec![("NetworkInterfaceId", "@"), ("Attribute", "description")], &interface),
        ("ResetNetworkInterfaceAttribute", vec![("NetworkInterfaceId", "@"), ("SourceDestCheck", "true")], &interface),
        ("AssignPrivateIpAddresses", vec![("NetworkInterfaceId", "@"), ("SecondaryPrivateIpAddressCount", "1")], &interface),
        ("UnassignPrivateIpAddresses", vec![("NetworkInterfaceId", "@"), ("PrivateIpAddress.1", "172.31.0.9")], &interface),
        ("DescribeSecurityGroupRules", vec![("SecurityGroupRuleId.1", "@")], &rule),
        (
            "UpdateSecurityGroupRuleDescriptionsIngress",
            vec![("GroupId", "@"), ("SecurityGroupRuleDescription.1.SecurityGroupRuleId", "sgr-0123456789abcdef0")],
            &group,
        ),
        (
            "ModifySecurityGroupRules",
            vec![
                ("GroupId", "@"),
                ("SecurityGroupRule.1.SecurityGroupRuleId", "sgr-0123456789abcdef0"),
                ("SecurityGroupRule.1.SecurityGroupRule.IpProtocol", "-1"),
                ("SecurityGroupRule.1.SecurityGroupRule.CidrIpv4", "0.0.0.0/0"),
            ],
            &group,
        ),
        ("DescribeManagedPrefixLists", vec![("PrefixListId.1", "@")], &prefixes),
        ("GetManagedPrefixListEntries", vec![("PrefixListId", "@")], &prefixes),
        ("GetManagedPrefixListAssociations", vec![("PrefixListId", "@")], &prefixes),
        ("ModifyManagedPrefixList", vec![("PrefixListId", "@"), ("PrefixListName", "mine")], &prefixes),
        ("RestoreManagedPrefixListVersion", vec![("PrefixListId", "@"), ("CurrentVersion", "1"), ("PreviousVersion", "1")], &prefixes),
        ("DeleteManagedPrefixList", vec![("PrefixListId", "@")], &prefixes),
        ("DescribeDhcpOptions", vec![("DhcpOptionsId.1", "@")], &options),
        ("AssociateDhcpOptions", vec![("DhcpOptionsId", "default"), ("VpcId", "@")], &vpc),
        ("DeleteDhcpOptions", vec![("DhcpOptionsId", "@")], &options),
        ("CreateNetworkAcl", vec![("VpcId", "@")], &vpc),
        ("DescribeNetworkAcls", vec![("NetworkAclId.1", "@")], &acl),
        ("DeleteNetworkAcl", vec![("NetworkAclId", "@")], &acl),
        ("DeleteNetworkAclEntry", vec![("NetworkAclId", "@"), ("RuleNumber", "100"), ("Egress", "false")], &acl),
        (
            "CreateNetworkAclEntry",
            vec![
                ("NetworkAclId", "@"),
                ("RuleNumber", "100"),
                ("Protocol", "-1"),
                ("RuleAction", "allow"),
                ("Egress", "false"),
                ("CidrBlock", "0.0.0.0/0"),
            ],
            &acl,
        ),
        (
            "ReplaceNetworkAclEntry",
            vec![
                ("NetworkAclId", "@"),
                ("RuleNumber", "100"),
                ("Protocol", "-1"),
                ("RuleAction", "deny"),
                ("Egress", "false"),
                ("CidrBlock", "0.0.0.0/0"),
            ],
            &acl,
        ),
        ("ReplaceNetworkAclAssociation", vec![("AssociationId", "@"), ("NetworkAclId", "acl-0123456789abcdef0")], &filtered),
        ("CreateNatGateway", vec![("SubnetId", "@"), ("AllocationId", "eipalloc-0123456789abcdef0")], &subnet),
        ("CreateNatGateway", vec![("SubnetId", &own_subnet), ("AllocationId", "@")], &allocation),
        ("DescribeNatGateways", vec![("NatGatewayId.1", "@")], &nat),
        ("DeleteNatGateway", vec![("NatGatewayId", "@")], &nat),
        ("AssociateNatGatewayAddress", vec![("NatGatewayId", "@"), ("AllocationId.1", "eipalloc-0123456789abcdef0")], &nat),
        ("DisassociateNatGatewayAddress", vec![("NatGatewayId", "@"), ("AssociationId.1", "eipassoc-0123456789abcdef0")], &nat),
        ("CreateRoute", vec![("RouteTableId", &own_table), ("DestinationCidrBlock", "10.9.0.0/16"), ("NatGatewayId", "@")], &nat),
        (
            "CreateRoute",
            vec![("RouteTableId", &own_table), ("DestinationCidrBlock", "10.9.0.0/16"), ("NetworkInterfaceId", "@")],
            &interface,
        ),
        (
            "CreateRoute",
            vec![("RouteTableId", &own_table), ("DestinationCidrBlock", "10.9.0.0/16"), ("VpcPeeringConnectionId", "@")],
            &peering,
        ),
        ("CreateVpcPeeringConnection", vec![("VpcId", "@"), ("PeerVpcId", &own_vpc)], &vpc),
        ("CreateVpcPeeringConnection", vec![("VpcId", &own_vpc), ("PeerVpcId", "@")], &vpc),
        ("AcceptVpcPeeringConnection", vec![("VpcPeeringConnectionId", "@")], &peering),
        ("RejectVpcPeeringConnection", vec![("VpcPeeringConnectionId", "@")], &peering),
        ("DeleteVpcPeeringConnection", vec![("VpcPeeringConnectionId", "@")], &peering),
        ("DescribeVpcPeeringConnections", vec![("VpcPeeringConnectionId.1", "@")], &peering),
        (
            "ModifyVpcPeeringConnectionOptions",
            vec![("VpcPeeringConnectionId", "@"), ("RequesterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc", "true")],
            &peering,
        ),
        ("CreateTags", vec![("ResourceId.1", "@"), ("Tag.1.Key", "k"), ("Tag.1.Value", "v")], &nat),
        ("CreateTags", vec![("ResourceId.1", "@"), ("Tag.1.Key", "k"), ("Tag.1.Value", "v")], &peering),
        ("DescribeStaleSecurityGroups", vec![("VpcId", "@")], &vpc),
        ("DescribeSecurityGroupReferences", vec![("GroupId.1", "@")], &group),
    ];
    for (action, parameters, id) in &cases {
        let with = |id: &str| {
            let parameters: Vec<(&str, &str)> =
                parameters.iter().map(|(name, value)| (*name, if *value == "@" { id } else { *value })).collect();
            match region.try_call_as(&stranger, action, &parameters) {
                Ok(answer) => panic!("{action} with {id} was accepted: {}", answer.0),
                Err(refusal) => (refusal.code, refusal.message.replace(id, "@")),
            }
        };
        assert_eq!(with(id), with(&unknown(id)), "{action} tells a foreign {id} from an unknown one");
    }
    assert_eq!(region.state(&instance), "running");
}
