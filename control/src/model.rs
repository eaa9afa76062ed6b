//! The rows of the world: one type per noun, each a JSON document in the
//! store and an `Arc` in memory.
//!
//! Every row is keyed (account, id); rows of the region itself (cards,
//! counters, access keys, public addresses) stand under the account [`REGION`].
//! Ids are strings because their prefix already names their kind (`vpc-`,
//! `eni-`) and because they leave through the shapes as strings. A field that
//! is added later carries `#[serde(default)]`, so that old documents open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::shape::Timestamp;
use crate::world::{Key, Row, Table, Tables};

/// The account of rows that belong to no tenant.
pub const REGION: &str = "";

/// A moment: Unix time in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// The moment now. Only the edges of the daemon call this; everything inside is told the time.
    pub fn now() -> Self {
        let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    }

    /// Whole seconds since 1970.
    pub fn seconds(self) -> u64 {
        self.0 / 1000
    }

    /// This moment and `ms` milliseconds.
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this moment, 0 when it lies after.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// `2024-01-15 10:30:00 GMT`, as it stands in a state transition reason.
    pub fn gmt(self) -> String {
        let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second] GMT");
        let second = i64::try_from(self.seconds()).unwrap_or(i64::MAX);
        let moment = time::OffsetDateTime::from_unix_timestamp(second).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
        moment.format(format).unwrap_or_default()
    }
}

impl From<Time> for Timestamp {
    fn from(time: Time) -> Self {
        Self::from_unix_ms(i64::try_from(time.0).unwrap_or(i64::MAX))
    }
}

/// VXLAN network identifier of a VPC, 1..=16777215.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vni(pub u32);

/// Hardware address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A customer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names say it
pub struct Account {
    pub id: String, // 12 digits
    pub created: Time,
}

/// A key pair that signs requests, under [`REGION`] because it is looked up before the account is known.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AccessKey {
    pub id: String, // AKIA...
    pub account_id: String,
    pub secret: String,
    pub created: Time,
}

impl std::fmt::Debug for AccessKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("AccessKey").field("id", &self.id).field("account_id", &self.account_id).finish_non_exhaustive()
    }
}

/// A virtual private cloud.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Vpc {
    pub account_id: String,
    pub id: String,
    pub cidr: Ipv4Net,
    pub cidr_association_id: String, // vpc-cidr-assoc-...
    /// Further blocks, see AssociateVpcCidrBlock.
    #[serde(default)]
    pub secondary_cidrs: Vec<VpcCidr>,
    pub is_default: bool,
    pub vni: Vni,
    pub dhcp_options_id: String, // dopt-... or "default"
    pub dns_support: bool,
    pub dns_hostnames: bool,
    pub network_address_usage_metrics: bool,
    pub created: Time,
}

/// A further block of a VPC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VpcCidr {
    pub association_id: String,
    pub cidr: Ipv4Net,
}

/// A part of a VPC in one zone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Subnet {
    pub account_id: String,
    pub id: String,
    pub vpc_id: String,
    pub zone: String,
    pub cidr: Ipv4Net,
    pub default_for_zone: bool,
    pub map_public_ip_on_launch: bool,
    pub created: Time,
}

/// The way from a VPC to the public side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InternetGateway {
    pub account_id: String,
    pub id: String,
    pub vpc_id: Option<String>,
}

/// Routes of the subnets that are associated with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct RouteTable {
    pub account_id: String,
    pub id: String,
    pub vpc_id: String,
    /// Without the local routes: those follow from the VPC's blocks.
    pub routes: Vec<Route>,
    pub associations: Vec<RouteTableAssociation>,
    /// Routes for all blocks of a prefix list.
    #[serde(default)]
    pub prefix_list_routes: Vec<PrefixListRoute>,
}

/// One route for all blocks of a prefix list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PrefixListRoute {
    pub prefix_list_id: String,
    pub target: RouteTarget,
}

/// One route that a tenant made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Route {
    pub destination: Ipv4Net,
    pub target: RouteTarget,
}

/// Where a route leads. A target that is gone or detached makes it a black hole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum RouteTarget {
    InternetGateway(String),
    NetworkInterface(String),
    NatGateway(String),
    VpcPeeringConnection(String),
}

/// Which subnet uses a table; the main association serves all that name none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct RouteTableAssociation {
    pub id: String, // rtbassoc-...
    pub subnet_id: Option<String>,
    pub main: bool,
}

/// A stateful firewall: an unordered union of allows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SecurityGroup {
    pub account_id: String,
    pub id: String,
    pub vpc_id: String,
    pub name: String,
    pub description: String,
    pub rules: Vec<SecurityGroupRule>,
}

/// One allow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SecurityGroupRule {
    pub id: String, // sgr-...
    pub egress: bool,
    /// IANA number; none allows every protocol.
    pub protocol: Option<u8>,
    /// TCP and UDP: the first port; ICMP: the type. -1 is any.
    pub from_port: i32,
    /// TCP and UDP: the last port; ICMP: the code. -1 is any.
    pub to_port: i32,
    pub remote: RuleRemote,
    pub description: Option<String>,
}

/// The other side of an allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum RuleRemote {
    Ipv4(Ipv4Net),
    Ipv6(Ipv6Net),
    Group {
        account_id: String,
        group_id: String,
        /// How it was reached when the rule was made, if it is a group of another VPC.
        #[serde(default)]
        peering: Option<RulePeering>,
    },
    PrefixList(String),
}

impl RuleRemote {
    /// The prefix list, if it is one.
    pub fn prefix_list(&self) -> Option<&str> {
        match self {
            Self::PrefixList(id) => Some(id),
            _ => None,
        }
    }
}

/// The way to a group of a peered VPC: what a stale rule still shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct RulePeering {
    pub vpc_id: String,
    pub vpc_peering_connection_id: String,
}

/// A stateless, ordered filter of a subnet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NetworkAcl {
    pub account_id: String,
    pub id: String,
    pub vpc_id: String,
    pub is_default: bool,
    pub entries: Vec<NetworkAclEntry>,
    pub associations: Vec<NetworkAclAssociation>,
}

/// One numbered rule of a network ACL; 32767 is the final deny.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NetworkAclEntry {
    pub number: u16,
    pub egress: bool,
    pub protocol: Option<u8>,
    pub allow: bool,
    /// The remote side; a block of either family.
    pub cidr: IpNet,
    /// First and last, for TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// Type and code for ICMP, -1 for any.
    #[serde(default)]
    pub icmp: Option<(i16, i16)>,
}

/// Which subnet a network ACL filters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NetworkAclAssociation {
    pub id: String, // aclassoc-...
    pub subnet_id: String,
}

/// An elastic network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NetworkInterface {
    pub account_id: String,
    pub id: String,
    pub vpc_id: String,
    pub subnet_id: String,
    pub zone: String,
    pub mac: Mac,
    pub private_ip: Ipv4Addr,
    pub description: String,
    pub security_group_ids: Vec<String>,
    pub source_dest_check: bool,
    pub attachment: Option<NetworkInterfaceAttachment>,
    /// The public address that the launch asked for; none while the instance is stopped.
    pub auto_public_ip: Option<Ipv4Addr>,
    /// Whether a start takes a public address again.
    pub associate_public_ip: bool,
    pub created: Time,
    /// Further addresses in the subnet, in the order in which they came.
    #[serde(default)]
    pub secondary_ips: Vec<Ipv4Addr>,
    #[serde(default)]
    pub connection_tracking: ConnectionTracking,
}

impl NetworkInterface {
    /// All private addresses, the primary one first.
    pub fn private_ips(&self) -> impl Iterator<Item = Ipv4Addr> {
        std::iter::once(self.private_ip).chain(self.secondary_ips.iter().copied())
    }
}

/// After how many seconds an idle connection is forgotten; none stands for EC2's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ConnectionTracking {
    pub tcp_established_s: Option<u32>, // 60..=432000
    pub udp_stream_s: Option<u32>,      // 60..=180
    pub udp_s: Option<u32>,             // 30..=60
}

/// Which instance an interface belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NetworkInterfaceAttachment {
    pub id: String, // eni-attach-...
    pub instance_id: String,
    pub device_index: u32,
    pub attach_time: Time,
    pub delete_on_termination: bool,
    #[serde(default = "attached")]
    pub state: AttachmentState,
}

/// Attachments of interfaces had no state once.
fn attached() -> AttachmentState {
    AttachmentState::Attached
}

/// An Elastic IP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Address {
    pub account_id: String,
    pub id: String, // eipalloc-...
    pub public_ip: Ipv4Addr,
    pub association: Option<AddressAssociation>,
    pub created: Time,
}

/// The interface that an Elastic IP leads to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AddressAssociation {
    pub id: String, // eipassoc-...
    pub network_interface_id: String,
    pub private_ip: Ipv4Addr,
}

/// A public address in use, under [`REGION`]; its id is the address in dotted form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PublicIp {
    pub ip: Ipv4Addr,
    pub account_id: String,
    /// `eni-...` of an instance or `eipalloc-...`.
    pub holder: String,
}

/// A key that a guest lets in; only its public half is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct KeyPair {
    pub account_id: String,
    pub id: String, // key-...
    pub name: String,
    pub kind: String, // rsa, ed25519
    pub fingerprint: String,
    pub public_key: String, // one OpenSSH line
    pub created: Time,
}

/// A machine image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Image {
    pub account_id: String,
    pub id: String,
    pub name: String,
    pub description: String,
    /// `amazon` for images of the operator.
    pub owner_alias: Option<String>,
    pub public: bool,
    /// Key in the image store.
    pub object: String,
    pub size_bytes: u64,
    pub architecture: String,
    pub platform: String, // Linux, Windows
    pub root_device_name: String,
    /// Login user, for the operator's tools.
    pub user: Option<String>,
    pub boot: Option<BootSource>,
    pub created: Time,
}

/// A kernel that is booted directly, as object keys of the image store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BootSource {
    pub kernel: String,
    #[serde(default)]
    pub initrd: String,
    #[serde(default)]
    pub command_line: String,
}

/// Life of an instance; the values are EC2's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum InstanceState {
    Pending = 0,
    Running = 16,
    ShuttingDown = 32,
    Terminated = 48,
    Stopping = 64,
    Stopped = 80,
}

impl InstanceState {
    /// EC2's number of the state.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

/// Why an instance changed its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct StateReason {
    pub code: String,
    pub message: String,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Instance {
    pub account_id: String,
    pub id: String,
    pub reservation_id: String,
    pub launch_index: u32,
    pub image_id: String,
    pub instance_type: String,
    pub state: InstanceState,
    pub state_reason: Option<StateReason>,
    pub transition_reason: String,
    pub key_name: Option<String>,
    /// As it was at the launch: deleting the key pair takes nobody's access.
    pub public_key: Option<String>,
    pub vpc_id: String,
    pub subnet_id: String,
    pub zone: String,
    /// Decoded.
    pub user_data: Vec<u8>,
    pub metadata_options: MetadataOptions,
    pub disable_api_termination: bool,
    #[serde(default)]
    pub disable_api_stop: bool,
    pub terminate_on_shutdown: bool,
    pub ebs_optimized: bool,
    pub monitoring: bool,
    pub cpu_credits: Option<String>,
    pub root_device_name: String,
    pub architecture: String,
    pub platform: String,
    pub boot: Option<BootSource>,
    /// When it was last started.
    pub launch_time: Time,
    pub created: Time,
    pub terminated: Option<Time>,
    pub client_token: Option<String>,
    /// The card that holds its reservation, from launch or start to stopped or terminated.
    pub placement: Option<Placement>,
    /// Reboots asked for.
    pub boot_count: u64,
    /// While stopping: the machine has halted, so that what belongs to it may leave the card.
    #[serde(default)]
    pub halted: bool,
}

/// A claim on a host: what the ledger of placement sums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Placement {
    pub card_id: String,
    pub vcpus: u32,
    pub memory_mib: u64,
}

/// How the metadata service behaves towards one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MetadataOptions {
    pub enabled: bool,
    pub tokens_required: bool,
    pub hop_limit: u32, // 1..=64
    pub tags_enabled: bool,
}

/// Life of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum VolumeState {
    Creating,
    Available,
    InUse,
    Deleting,
    Error,
}

impl VolumeState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Deleting => "deleting",
            Self::Error => "error",
        }
    }
}

/// A disk that outlives its instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Volume {
    pub account_id: String,
    pub id: String,
    pub zone: String,
    pub size_gib: u32,
    pub kind: String, // gp3
    pub iops: Option<u32>,
    pub throughput_mib_s: Option<u32>,
    pub encrypted: bool,
    pub kms_key_id: Option<String>,
    pub multi_attach: bool,
    pub state: VolumeState,
    /// Object key of the image that it is a clone of.
    pub image_object: Option<String>,
    pub attachment: Option<VolumeAttachment>,
    /// The storage card that keeps it.
    pub card_id: String,
    pub created: Time,
}

/// Life of an attachment; detached is its absence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum AttachmentState {
    Attaching,
    Attached,
    Detaching,
}

impl AttachmentState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
        }
    }
}

/// The instance that a volume belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VolumeAttachment {
    pub instance_id: String,
    pub device: String,
    pub state: AttachmentState,
    pub attach_time: Time,
    pub delete_on_termination: bool,
    /// Whether the guest boots from it.
    pub root: bool,
}

/// All tags of one resource; its id is the resource's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Tags {
    pub account_id: String,
    pub resource_id: String,
    pub resource_type: String, // instance, vpc, ...
    pub tags: BTreeMap<String, String>,
}

/// An answered request with a client token; its id is `Action/token`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ClientToken {
    pub account_id: String,
    pub id: String,
    /// Hash of the request without the token.
    pub request: String,
    /// The id of what the request made: the answer is rebuilt from it.
    pub result: String,
    pub created: Time,
}

/// What DHCP tells the guests of a VPC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct DhcpOptions {
    pub account_id: String,
    pub id: String, // dopt-...
    pub configurations: BTreeMap<String, Vec<String>>,
    /// Whether new VPCs get it; once every set was such a one.
    #[serde(default = "yes")]
    pub is_default: bool,
}

fn yes() -> bool {
    true
}

/// A card as it last introduced itself, under [`REGION`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Card {
    pub id: String,
    pub zone: String,
    pub compute: bool,
    pub storage: bool,
    pub underlay_ip: Ipv4Addr,
    pub storage_address: String,
    pub initiator_nqn: String,
    pub storage_bytes: u64,
    pub cores: u32,
    pub memory_bytes: u64,
    pub host_connected: bool,
    pub machine: String,
    /// Whether its watch stream stands; never stored, so false after a start of control.
    #[serde(skip)]
    pub watched: bool,
    /// When the watch stream last came or went.
    #[serde(skip)]
    pub watched_since: Time,
}

/// A number that only rises, under [`REGION`]: `vni`, `epoch`, `event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Counter {
    pub name: String,
    pub value: u64,
}

/// Kinds of objects that a card holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum ObjectKind {
    Network,
    Volume,
    Disk,
    Port,
    Instance,
    NatGateway,
}

/// An object that a card was told to hold or to forget, under [`REGION`]; it
/// lives from before the first Put until the card says Gone, so that its
/// generation never falls and nothing is forgotten on a card that is away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CardObject {
    pub card_id: String,
    pub kind: ObjectKind,
    pub id: String,
    pub generation: u64,
    /// Hash of the content without the generation; none: it shall go.
    pub content: Option<String>,
}

/// A fact, written in the same transaction as what it reports, under [`REGION`] in the order of the commits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Event {
    pub account_id: String,
    /// Position in the region's order.
    pub sequence: u64,
    pub time: Time,
    pub kind: String, // InstanceLaunchRequested, ...
    pub resource_id: String,
    pub detail: BTreeMap<String, String>,
}

/// The two kinds of IP addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum AddressFamily {
    Ipv4,
    Ipv6,
}

impl AddressFamily {
    /// EC2's name of the family.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

/// What became of the last change of a prefix list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum PrefixListState {
    CreateComplete,
    ModifyComplete,
    ModifyFailed,
    RestoreComplete,
}

impl PrefixListState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::CreateComplete => "create-complete",
            Self::ModifyComplete => "modify-complete",
            Self::ModifyFailed => "modify-failed",
            Self::RestoreComplete => "restore-complete",
        }
    }
}

/// Life of a NAT gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum NatGatewayState {
    Pending,
    Failed,
    Available,
    Deleting,
    Deleted,
}

impl NatGatewayState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Failed => "failed",
            Self::Available => "available",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }
}

/// A managed prefix list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PrefixList {
    pub account_id: String,
    pub id: String, // pl-...
    pub name: String,
    pub family: AddressFamily,
    pub max_entries: u32, // 1..=1000
    pub state: PrefixListState,
    pub state_message: Option<String>,
    /// 1 and up.
    pub version: u64,
    /// Of this version, sorted by block.
    pub entries: Vec<PrefixListEntry>,
}

/// What a prefix list was before it was changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PrefixListVersion {
    pub account_id: String,
    pub prefix_list_id: String,
    pub version: u64,
    pub entries: Vec<PrefixListEntry>,
}

impl PrefixListVersion {
    /// The row id of a version: `list/version`.
    pub fn row_id(prefix_list_id: &str, version: u64) -> String {
        format!("{prefix_list_id}/{version}")
    }
}

/// One block of a prefix list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PrefixListEntry {
    pub cidr: IpNet,
    pub description: String,
}

/// A NAT gateway: lets the ports of its VPC open connections to the internet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NatGateway {
    pub account_id: String,
    pub id: String, // nat-...
    pub vpc_id: String,
    pub subnet_id: String,
    pub zone: String,
    pub state: NatGatewayState,
    /// Why it cannot become available.
    pub failure: Option<StateReason>,
    /// Its interface, which goes when the gateway is deleted or has failed.
    pub network_interface_id: Option<String>,
    /// The primary address first.
    pub addresses: Vec<NatGatewayAddress>,
    /// The card that does its work; none while no card of the zone can.
    pub card_id: Option<String>,
    pub created: Time,
    /// When it was deleted or failed.
    pub ended: Option<Time>,
}

/// One public address of a NAT gateway, and the private one under which it stands in the subnet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NatGatewayAddress {
    pub allocation_id: String,
    pub association_id: Option<String>,
    pub public_ip: Option<Ipv4Addr>,
    pub private_ip: Option<Ipv4Addr>,
    pub state: NatGatewayAddressState,
}

/// Life of an address of a NAT gateway; disassociated is its absence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum NatGatewayAddressState {
    Associating,
    Succeeded,
    Disassociating,
    Failed,
}

impl NatGatewayAddressState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::Associating => "associating",
            Self::Succeeded => "succeeded",
            Self::Disassociating => "disassociating",
            Self::Failed => "failed",
        }
    }
}

/// Life of a peering connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum PeeringState {
    PendingAcceptance,
    Active,
    Failed,
    Rejected,
    Expired,
    Deleted,
}

impl PeeringState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::PendingAcceptance => "pending-acceptance",
            Self::Active => "active",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::Deleted => "deleted",
        }
    }
}

/// A way between two VPCs, under [`REGION`] because it may be two accounts'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VpcPeeringConnection {
    pub id: String, // pcx-...
    pub requester: PeeringSide,
    pub accepter: PeeringSide,
    pub state: PeeringState,
    pub created: Time,
    /// When it came to an end, and by whose hand.
    pub ended: Option<(Time, String)>,
}

/// One side of a peering connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PeeringSide {
    pub account_id: String,
    pub vpc_id: String,
    /// The blocks of the VPC; not known of another account's before it accepts.
    pub cidrs: Vec<Ipv4Net>,
    /// AllowDnsResolutionFromRemoteVpc.
    pub remote_dns: bool,
}

/// Binds a row type to its table, its name in the store, its key and its indexes.
macro_rules! tables {
    ($($row:ident, $table:ident, $name:literal, |$this:ident| $account:expr, $id:expr,
        [$($index:literal => $value:expr),* $(,)?] $(, sums $sums:expr)?;)*) => {
        impl Tables {
            /// Reads one stored document into its table.
            ///
            /// # Errors
            /// When the kind is unknown or the document does not parse.
            pub(crate) fn load(&mut self, kind: &str, document: &[u8]) -> Result<(), crate::world::LoadError> {
                match kind {
                    $($name => { self.$table.insert(serde_json::from_slice::<$row>(document)?.into()); })*
                    _ => return Err(crate::world::LoadError::Kind(kind.to_owned())),
                }
                Ok(())
            }
        }
        $(impl Row for $row {
            const KIND: &'static str = $name;
            #[allow(unused_variables)] // by rows of the region
            fn account(&self) -> &str { let $this = self; $account }
            fn id(&self) -> std::borrow::Cow<'_, str> { let $this = self; $id.into() }
            #[allow(unused_mut, unused_variables)] // by rows without an index
            fn indexes(&self) -> BTreeSet<Key> {
                let ($this, mut keys) = (self, BTreeSet::new());
                $(keys.extend(IntoIterator::into_iter($value).map(|value| ($index, value.to_string())));)*
                keys
            }
            #[allow(unused_mut, unused_variables)] // by rows without a sum
            fn sums(&self) -> Vec<(Key, u64)> {
                let ($this, mut sums) = (self, Vec::new());
                $(sums.extend($sums);)?
                sums
            }
            fn table(tables: &Tables) -> &Table<Self> { &tables.$table }
            fn table_mut(tables: &mut Tables) -> &mut Table<Self> { &mut tables.$table }
        })*
    };
}

tables! {
    Account, accounts, "account", |row| REGION, &row.id, [];
    AccessKey, access_keys, "access_key", |row| REGION, &row.id, ["account" => [&row.account_id]];
    Vpc, vpcs, "vpc", |row| &row.account_id, &row.id, ["id" => [&row.id], "dhcp" => [&row.dhcp_options_id]];
    Subnet, subnets, "subnet", |row| &row.account_id, &row.id, ["vpc" => [&row.vpc_id]];
    InternetGateway, internet_gateways, "internet_gateway", |row| &row.account_id, &row.id, ["vpc" => &row.vpc_id];
    RouteTable, route_tables, "route_table", |row| &row.account_id, &row.id, ["vpc" => [&row.vpc_id], "prefix_list" => row.prefix_list_routes.iter().map(|r| &r.prefix_list_id), "subnet" => row.associations.iter().filter_map(|a| a.subnet_id.as_ref())];
    SecurityGroup, security_groups, "security_group", |row| &row.account_id, &row.id, ["vpc" => [&row.vpc_id], "prefix_list" => row.rules.iter().filter_map(|r| r.remote.prefix_list())];
    NetworkAcl, network_acls, "network_acl", |row| &row.account_id, &row.id, ["vpc" => [&row.vpc_id], "subnet" => row.associations.iter().map(|a| &a.subnet_id)];
    NetworkInterface, network_interfaces, "network_interface", |row| &row.account_id, &row.id,
        ["id" => [&row.id], "vpc" => [&row.vpc_id], "subnet" => [&row.subnet_id], "instance" => row.attachment.as_ref().map(|a| &a.instance_id), "attachment" => row.attachment.as_ref().map(|a| &a.id), "group" => &row.security_group_ids];
    Address, addresses, "address", |row| &row.account_id, &row.id, ["interface" => row.association.as_ref().map(|a| &a.network_interface_id), "ip" => [row.public_ip]];
    PublicIp, public_ips, "public_ip", |row| REGION, row.ip.to_string(), [];
    KeyPair, key_pairs, "key_pair", |row| &row.account_id, &row.id, ["name" => [&row.name]];
    Image, images, "image", |row| &row.account_id, &row.id, ["id" => [&row.id]];
    Instance, instances, "instance", |row| &row.account_id, &row.id, ["id" => [&row.id], "reservation" => [&row.reservation_id], "vpc" => [&row.vpc_id],
            "leaving" => (row.state == InstanceState::ShuttingDown && row.placement.is_none()).then_some(""), "card" => row.placement.as_ref().map(|p| &p.card_id)],
        sums row.placement.iter().flat_map(|p| [(("vcpus", p.card_id.clone()), u64::from(p.vcpus)), (("memory_mib", p.card_id.clone()), p.memory_mib)]);
    Volume, volumes, "volume", |row| &row.account_id, &row.id,
        ["id" => [&row.id], "instance" => row.attachment.as_ref().map(|a| &a.instance_id), "card" => [&row.card_id]],
        sums [(("gib", row.card_id.clone()), u64::from(row.size_gib))];
    Tags, tags, "tags", |row| &row.account_id, &row.resource_id, [];
    ClientToken, client_tokens, "client_token", |row| &row.account_id, &row.id, [];
    DhcpOptions, dhcp_options, "dhcp_options", |row| &row.account_id, &row.id, [];
    Card, cards, "card", |row| REGION, &row.id, [];
    Counter, counters, "counter", |row| REGION, &row.name, [];
    CardObject, card_objects, "card_object", |row| REGION, CardObject::row_id(&row.card_id, row.kind, &row.id), ["card" => [&row.card_id], "object" => [&row.id]];
    Event, events, "event", |row| REGION, Event::row_id(row.sequence), ["resource" => [&row.resource_id]];
    PrefixList, prefix_lists, "prefix_list", |row| &row.account_id, &row.id, [];
    PrefixListVersion, prefix_list_versions, "prefix_list_version", |row| &row.account_id, PrefixListVersion::row_id(&row.prefix_list_id, row.version),
        ["list" => [&row.prefix_list_id]];
    NatGateway, nat_gateways, "nat_gateway", |row| &row.account_id, &row.id,
        ["vpc" => [&row.vpc_id], "subnet" => [&row.subnet_id], "interface" => &row.network_interface_id, "card" => &row.card_id,
            "unplaced" => (row.card_id.is_none() && !matches!(row.state, NatGatewayState::Failed | NatGatewayState::Deleted)).then_some("")],
        sums row.card_id.iter().map(|card| (("gateways", card.clone()), 1));
    VpcPeeringConnection, vpc_peering_connections, "vpc_peering_connection", |row| REGION, &row.id,
        ["account" => [&row.requester.account_id, &row.accepter.account_id], "vpc" => [&row.requester.vpc_id, &row.accepter.vpc_id]];
}

impl Event {
    /// The row id of an event: its sequence, so that rows stand in this order.
    pub fn row_id(sequence: u64) -> String {
        format!("{sequence:020}")
    }
}

impl CardObject {
    /// The row id of an object on a card: `card/kind/id`.
    pub fn row_id(card_id: &str, kind: ObjectKind, id: &str) -> String {
        format!("{card_id}/{kind:?}/{id}")
    }
}
