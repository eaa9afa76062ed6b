//! Entries of network ACLs: numbered allows and denials, of which the first that matches decides.
//!
//! Each direction of an ACL has its own numbers, 1 to 32766, shared by both address families. 32767 is the denial of what nothing
//! else matched, which EC2 shows as `*` and nobody can change. Replies need entries of their own: an ACL remembers no connections.

use ipnet::IpNet;

use super::id::NETWORK_ACL;
use super::security_group_rule::parse_protocol;
use crate::error::ApiError;
use crate::model::{NetworkAcl, NetworkAclEntry};
use crate::shapes::{CreateNetworkAclEntryRequest, DeleteNetworkAclEntryRequest, IcmpTypeCode, PortRange, ReplaceNetworkAclEntryRequest};
use crate::world::Call;

/// The number of the final denial.
pub const LAST: u16 = 32767;
/// The most entries of one direction and one address family, the final denial among them.
const MOST_ENTRIES: usize = 20;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The final denial of one direction.
pub fn last(egress: bool) -> NetworkAclEntry {
    NetworkAclEntry { number: LAST, egress, protocol: None, allow: false, cidr: everything(), ports: None, icmp: None }
}

/// The entry that lets everything through in one direction.
pub fn open(egress: bool) -> NetworkAclEntry {
    NetworkAclEntry { number: 100, allow: true, ..last(egress) }
}

fn everything() -> IpNet {
    IpNet::V4(ipnet::Ipv4Net::default())
}

/// What Create and Replace have in common.
struct Described {
    egress: Option<bool>,
    rule_number: Option<i32>,
    protocol: Option<String>,
    rule_action: Option<String>,
    cidr_block: Option<String>,
    ipv6_cidr_block: Option<String>,
    port_range: Option<PortRange>,
    icmp_type_code: Option<IcmpTypeCode>,
}

/// CreateNetworkAclEntry.
///
/// # Errors
/// `NetworkAclEntryAlreadyExists`, `NetworkAclEntryLimitExceeded`, `InvalidParameterValue`.
pub fn create_network_acl_entry(call: &mut Call<'_>, request: CreateNetworkAclEntryRequest) -> Result<(), ApiError> {
    let id = NETWORK_ACL.required(request.network_acl_id, "NetworkAclId")?;
    let acl = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
    let entry = parse(Described {
        egress: request.egress,
        rule_number: request.rule_number,
        protocol: request.protocol,
        rule_action: request.rule_action,
        cidr_block: request.cidr_block,
        ipv6_cidr_block: request.ipv6_cidr_block,
        port_range: request.port_range,
        icmp_type_code: request.icmp_type_code,
    })?;
    if find(&acl, entry.egress, entry.number).is_some() {
        let message = format!("The network acl entry identified by {} already exists.", entry.number);
        return Err(ApiError::new("NetworkAclEntryAlreadyExists", message));
    }
    check_room(&acl, &entry)?;
    call.tx.update::<NetworkAcl>(&acl.account_id, &id, |acl| {
        acl.entries.push(entry);
        sort(acl);
    });
    Ok(())
}

/// ReplaceNetworkAclEntry.
///
/// # Errors
/// `InvalidNetworkAclEntry.NotFound`, else as [`create_network_acl_entry`].
pub fn replace_network_acl_entry(call: &mut Call<'_>, request: ReplaceNetworkAclEntryRequest) -> Result<(), ApiError> {
    let id = NETWORK_ACL.required(request.network_acl_id, "NetworkAclId")?;
    let acl = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
    let entry = parse(Described {
        egress: request.egress,
        rule_number: request.rule_number,
        protocol: request.protocol,
        rule_action: request.rule_action,
        cidr_block: request.cidr_block,
        ipv6_cidr_block: request.ipv6_cidr_block,
        port_range: request.port_range,
        icmp_type_code: request.icmp_type_code,
    })?;
    let old = find(&acl, entry.egress, entry.number).ok_or_else(|| not_found(entry.number))?;
    if family(old) != family(&entry) {
        check_room(&acl, &entry)?;
    }
    call.tx.update::<NetworkAcl>(&acl.account_id, &id, |acl| {
        acl.entries.retain(|other| (other.egress, other.number) != (entry.egress, entry.number));
        acl.entries.push(entry);
        sort(acl);
    });
    Ok(())
}

/// DeleteNetworkAclEntry.
///
/// # Errors
/// `InvalidNetworkAclEntry.NotFound`, `InvalidParameterValue` for the final denial.
pub fn delete_network_acl_entry(call: &mut Call<'_>, request: DeleteNetworkAclEntryRequest) -> Result<(), ApiError> {
    let id = NETWORK_ACL.required(request.network_acl_id, "NetworkAclId")?;
    let acl = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
    let number = parse_number(request.rule_number)?;
    let egress = request.egress.ok_or_else(|| ApiError::missing_parameter("Egress"))?;
    find(&acl, egress, number).ok_or_else(|| not_found(number))?;
    call.tx.update::<NetworkAcl>(&acl.account_id, &id, |acl| {
        acl.entries.retain(|entry| (entry.egress, entry.number) != (egress, number));
    });
    Ok(())
}

fn find(acl: &NetworkAcl, egress: bool, number: u16) -> Option<&NetworkAclEntry> {
    acl.entries.iter().find(|entry| (entry.egress, entry.number) == (egress, number))
}

fn not_found(number: u16) -> ApiError {
    ApiError::new("InvalidNetworkAclEntry.NotFound", format!("The network acl entry identified by {number} does not exist"))
}

/// Egress first, as EC2 shows them, then by number.
fn sort(acl: &mut NetworkAcl) {
    acl.entries.sort_by_key(|entry| (!entry.egress, entry.number));
}

/// Whether an entry is about IPv4.
fn family(entry: &NetworkAclEntry) -> bool {
    matches!(entry.cidr, IpNet::V4(_))
}

fn check_room(acl: &NetworkAcl, new: &NetworkAclEntry) -> Result<(), ApiError> {
    let same = |entry: &&NetworkAclEntry| entry.egress == new.egress && family(entry) == family(new);
    if acl.entries.iter().filter(same).count() >= MOST_ENTRIES {
        let message = format!("The maximum number of network acl entries has been reached for network acl '{}'.", acl.id);
        return Err(ApiError::new("NetworkAclEntryLimitExceeded", message));
    }
    Ok(())
}

fn parse_number(number: Option<i32>) -> Result<u16, ApiError> {
    let number = number.ok_or_else(|| ApiError::missing_parameter("RuleNumber"))?;
    u16::try_from(number).ok().filter(|number| (1..LAST).contains(number)).ok_or_else(|| {
        ApiError::invalid_value(format!("Value ({number}) for parameter ruleNumber is invalid. A rule number is between 1 and 32766."))
    })
}

fn parse(described: Described) -> Result<NetworkAclEntry, ApiError> {
    let number = parse_number(described.rule_number)?;
    let egress = described.egress.ok_or_else(|| ApiError::missing_parameter("Egress"))?;
    let protocol = parse_protocol(described.protocol.as_deref())?;
    let cidr = match (described.cidr_block, described.ipv6_cidr_block) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid_combination("The parameters CidrBlock and Ipv6CidrBlock cannot be used together"));
        }
        (Some(text), None) => text.parse().map(IpNet::V4).map_err(|_| malformed("cidrBlock", &text))?,
        (None, Some(text)) => text.parse().map(IpNet::V6).map_err(|_| malformed("ipv6CidrBlock", &text))?,
        (None, None) => return Err(ApiError::new("MissingParameter", "Either CidrBlock or Ipv6CidrBlock must be specified")),
    };
    Ok(NetworkAclEntry {
        number,
        egress,
        protocol,
        allow: described.rule_action.as_deref() == Some("allow"),
        cidr: cidr.trunc(),
        ports: parse_ports(protocol, described.port_range)?,
        icmp: parse_icmp(protocol, described.icmp_type_code)?,
    })
}

fn malformed(parameter: &str, text: &str) -> ApiError {
    ApiError::invalid_value(format!("Value ({text}) for parameter {parameter} is invalid. This is not a valid CIDR block."))
}

/// The ports of an entry for TCP or UDP, which has to name them; other protocols have none, whatever the request says.
fn parse_ports(protocol: Option<u8>, range: Option<PortRange>) -> Result<Option<(u16, u16)>, ApiError> {
    if !matches!(protocol, Some(TCP | UDP)) {
        return Ok(None);
    }
    let (from, to) = range.map_or((None, None), |range| (range.from, range.to));
    let (Some(from), Some(to)) = (from, to) else {
        return Err(ApiError::new("MissingParameter", "The parameters PortRange.From and PortRange.To are required for TCP and UDP"));
    };
    match (u16::try_from(from), u16::try_from(to)) {
        (Ok(from), Ok(to)) if from <= to => Ok(Some((from, to))),
        _ => Err(ApiError::invalid_value(format!("Invalid TCP/UDP port range ({from}:{to})"))),
    }
}

/// Type and code of an entry for ICMP, which has to name them.
fn parse_icmp(protocol: Option<u8>, kind: Option<IcmpTypeCode>) -> Result<Option<(i16, i16)>, ApiError> {
    if !matches!(protocol, Some(ICMP | ICMPV6)) {
        return Ok(None);
    }
    let (kind, code) = kind.map_or((None, None), |kind| (kind.r#type, kind.code));
    let (Some(kind), Some(code)) = (kind, code) else {
        return Err(ApiError::new("MissingParameter", "The parameters Icmp.Type and Icmp.Code are required for ICMP"));
    };
    let valid = |value: i32| i16::try_from(value).ok().filter(|value| (-1..=255).contains(value));
    match (valid(kind), valid(code)) {
        (Some(-1), Some(code)) if code != -1 => {
            Err(ApiError::invalid_value("Invalid value for ICMP code. All types (-1) have all codes (-1)."))
        }
        (Some(kind), Some(code)) => Ok(Some((kind, code))),
        _ => Err(ApiError::invalid_value(format!("Invalid ICMP type or code ({kind}:{code})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::network_acl::{create_network_acl, describe_network_acls};
    use crate::shapes::{self, CreateNetworkAclRequest, DescribeNetworkAclsRequest};

    fn new_acl(fixture: &Fixture) -> String {
        let vpc = fixture.default_vpc(ALICE).id;
        let request = CreateNetworkAclRequest { vpc_id: Some(vpc), ..Default::default() };
        fixture.call(ALICE, |call| create_network_acl(call, request)).unwrap().network_acl.unwrap().network_acl_id.unwrap()
    }

    fn entry(acl: &str, number: i32, protocol: &str, cidr: &str) -> CreateNetworkAclEntryRequest {
        CreateNetworkAclEntryRequest {
            network_acl_id: Some(acl.into()),
            rule_number: Some(number),
            protocol: Some(protocol.into()),
            rule_action: Some("allow".into()),
            egress: Some(false),
            cidr_block: Some(cidr.into()),
            port_range: Some(PortRange { from: Some(80), to: Some(443) }),
            ..Default::default()
        }
    }

    fn delete(acl: &str, number: i32) -> DeleteNetworkAclEntryRequest {
        DeleteNetworkAclEntryRequest { network_acl_id: Some(acl.into()), rule_number: Some(number), egress: Some(false), dry_run: None }
    }

    fn entries(fixture: &Fixture, acl: &str) -> Vec<shapes::NetworkAclEntry> {
        let request = DescribeNetworkAclsRequest { network_acl_ids: vec![acl.into()], ..Default::default() };
        fixture.call(ALICE, |call| describe_network_acls(call, request)).unwrap().network_acls.remove(0).entries
    }

    #[test]
    fn entries_stand_in_the_order_of_their_numbers_and_end_with_the_denial() {
        let fixture = Fixture::new();
        let acl = new_acl(&fixture);
        for (number, protocol) in [(200, "6"), (100, "tcp"), (150, "17")] {
            fixture.call(ALICE, |call| create_network_acl_entry(call, entry(&acl, number, protocol, "10.1.2.3/16"))).unwrap();
        }
        let shown = entries(&fixture, &acl);
        let ingress: Vec<_> = shown.iter().filter(|entry| entry.egress == Some(false)).collect();
        assert_eq!(ingress.iter().map(|entry| entry.rule_number.unwrap()).collect::<Vec<_>>(), [100, 150, 200, 32767]);
        assert_eq!(ingress[0].cidr_block.as_deref(), Some("10.1.0.0/16"), "bits below the prefix are cleared");
        assert_eq!(ingress[1].protocol.as_deref(), Some("17"));
        assert_eq!(ingress[0].port_range, Some(PortRange { from: Some(80), to: Some(443) }));
        assert_eq!(ingress[3].rule_action.as_deref(), Some("deny"));
        let again = fixture.refusal(ALICE, |call| create_network_acl_entry(call, entry(&acl, 100, "6", "0.0.0.0/0")));
        assert_eq!(again, "NetworkAclEntryAlreadyExists");
    }

    #[test]
    fn an_entry_is_replaced_and_deleted_by_its_number_and_direction() {
        let fixture = Fixture::new();
        let acl = new_acl(&fixture);
        fixture.call(ALICE, |call| create_network_acl_entry(call, entry(&acl, 100, "6", "10.0.0.0/8"))).unwrap();
        let replacement = |number| ReplaceNetworkAclEntryRequest {
            network_acl_id: Some(acl.clone()),
            rule_number: Some(number),
            protocol: Some("1".into()),
            rule_action: Some("deny".into()),
            egress: Some(false),
            ipv6_cidr_block: Some("2001:db8::/32".into()),
            icmp_type_code: Some(IcmpTypeCode { r#type: Some(8), code: Some(-1) }),
            ..Default::default()
        };
        fixture.call(ALICE, |call| replace_network_acl_entry(call, replacement(100))).unwrap();
        let shown = entries(&fixture, &acl).into_iter().find(|entry| entry.rule_number == Some(100)).unwrap();
        assert_eq!((shown.cidr_block, shown.ipv6_cidr_block.as_deref()), (None, Some("2001:db8::/32")));
        assert_eq!(shown.icmp_type_code, Some(IcmpTypeCode { r#type: Some(8), code: Some(-1) }));
        let unknown = fixture.refusal(ALICE, |call| replace_network_acl_entry(call, replacement(101)));
        assert_eq!(unknown, "InvalidNetworkAclEntry.NotFound");
        let other_way = DeleteNetworkAclEntryRequest { egress: Some(true), ..delete(&acl, 100) };
        assert_eq!(fixture.refusal(ALICE, |call| delete_network_acl_entry(call, other_way)), "InvalidNetworkAclEntry.NotFound");
        fixture.call(ALICE, |call| delete_network_acl_entry(call, delete(&acl, 100))).unwrap();
        assert_eq!(entries(&fixture, &acl).len(), 2);
        for number in [0, -1, 32767, 65536] {
            assert_eq!(fixture.refusal(ALICE, |call| delete_network_acl_entry(call, delete(&acl, number))), "InvalidParameterValue");
        }
    }

    #[test]
    fn each_family_and_direction_has_twenty_entries_with_the_denial() {
        let fixture = Fixture::new();
        let acl = new_acl(&fixture);
        for number in 1..=19 {
            fixture.call(ALICE, |call| create_network_acl_entry(call, entry(&acl, number, "-1", "10.0.0.0/8"))).unwrap();
        }
        let full = fixture.refusal(ALICE, |call| create_network_acl_entry(call, entry(&acl, 20, "-1", "10.0.0.0/8")));
        assert_eq!(full, "NetworkAclEntryLimitExceeded");
        let six =
            CreateNetworkAclEntryRequest { cidr_block: None, ipv6_cidr_block: Some("::/0".into()), ..entry(&acl, 20, "-1", "10.0.0.0/8") };
        fixture.call(ALICE, |call| create_network_acl_entry(call, six)).unwrap();
        let out = CreateNetworkAclEntryRequest { egress: Some(true), ..entry(&acl, 20, "-1", "10.0.0.0/8") };
        fixture.call(ALICE, |call| create_network_acl_entry(call, out)).unwrap();
    }

    #[test]
    fn an_entry_that_says_too_little_or_nonsense_is_refused() {
        let fixture = Fixture::new();
        let acl = new_acl(&fixture);
        let good = || entry(&acl, 100, "6", "10.0.0.0/8");
        let icmp = |kind, code| CreateNetworkAclEntryRequest {
            protocol: Some("1".into()),
            icmp_type_code: Some(IcmpTypeCode { r#type: kind, code }),
            ..good()
        };
        let ports = |from, to| CreateNetworkAclEntryRequest { port_range: Some(PortRange { from, to }), ..good() };
        for (request, code) in [
            (CreateNetworkAclEntryRequest { port_range: None, ..good() }, "MissingParameter"),
            (CreateNetworkAclEntryRequest { cidr_block: None, ..good() }, "MissingParameter"),
            (CreateNetworkAclEntryRequest { ipv6_cidr_block: Some("::/0".into()), ..good() }, "InvalidParameterCombination"),
            (CreateNetworkAclEntryRequest { cidr_block: Some("10.0.0.0/33".into()), ..good() }, "InvalidParameterValue"),
            (CreateNetworkAclEntryRequest { rule_number: Some(32767), ..good() }, "InvalidParameterValue"),
            (CreateNetworkAclEntryRequest { protocol: Some("256".into()), ..good() }, "InvalidParameterValue"),
            (ports(Some(443), Some(80)), "InvalidParameterValue"),
            (ports(Some(-1), Some(80)), "InvalidParameterValue"),
            (ports(Some(80), None), "MissingParameter"),
            (icmp(None, Some(0)), "MissingParameter"),
            (icmp(Some(-1), Some(3)), "InvalidParameterValue"),
            (icmp(Some(256), Some(0)), "InvalidParameterValue"),
        ] {
            let shown = format!("{request:?}");
            assert_eq!(fixture.refusal(ALICE, |call| create_network_acl_entry(call, request)), code, "{shown}");
        }
        assert_eq!(fixture.refusal(BOB, |call| create_network_acl_entry(call, good())), "InvalidNetworkAclID.NotFound");
        assert_eq!(entries(&fixture, &acl).len(), 2, "nothing of it was kept");
    }
}
