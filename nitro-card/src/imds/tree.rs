//! The tree that a guest reads about itself.
//!
//! The rule that keeps cloud-init alive: **every name in every listing
//! answers**. A value that an instance does not have (no public address, no
//! key, no user data) has no name either. So the tree is built as nodes and
//! the listing is made from the nodes that are there.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use card_proto::card::Metadata;
use dataplane::{Address, Mac, Prefix};

/// Versions that the service answers under, all with the same tree.
const VERSIONS: [&str; 28] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-09-24",
    "latest",
];

/// What the service knows about one instance.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Subject {
    pub instance_id: String,
    pub metadata: Metadata,
    /// By device index: the first is the primary one.
    pub interfaces: Vec<Interface>,
    /// By attach time: the boot disk is marked.
    pub disks: Vec<MappedDisk>,
}

/// An elastic network interface as its guest sees it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Interface {
    pub id: String,
    pub device_index: u32,
    pub mac: Mac,
    pub private_ipv4: Ipv4Addr,
    pub public_ipv4: Option<Ipv4Addr>,
    pub secondary: Vec<Address>,
    pub local_hostname: String,
    pub vpc_id: String,
    pub subnet_id: String,
    pub subnet: Prefix,
    pub vpc_prefixes: Vec<Prefix>,
    pub security_group_ids: Vec<String>,
}

/// A disk as its guest sees it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct MappedDisk {
    pub device_name: String,
    pub boot: bool,
}

/// A place in the tree.
pub enum Node {
    /// A value.
    Leaf(Vec<u8>),
    /// Names.
    Folder(BTreeMap<String, Node>),
    /// Keys: listed as `0=name`, found as `0`.
    Keys(Vec<(String, Node)>),
}

impl Subject {
    /// What `path`, already decoded, answers; `None` is 404. Empty segments
    /// count for nothing: doubled and trailing slashes are tolerated.
    #[must_use]
    pub fn lookup(&self, path: &str) -> Option<Vec<u8>> {
        let mut segments = path.split('/').filter(|segment| !segment.is_empty());
        let Some(version) = segments.next() else {
            return Some(VERSIONS.join("\n").into_bytes());
        };
        VERSIONS.contains(&version).then_some(())?;
        let mut node = self.root();
        let mut segments = segments.peekable();
        if let (None, Node::Folder(entries)) = (segments.peek(), &node) {
            // EC2 marks folders from the next level on.
            return Some(entries.keys().map(String::as_str).collect::<Vec<_>>().join("\n").into_bytes());
        }
        for segment in segments {
            node = match node {
                Node::Leaf(_) => return None,
                Node::Folder(mut entries) => entries.remove(segment)?,
                Node::Keys(keys) => {
                    let index: usize = segment.parse().ok()?;
                    keys.into_iter().nth(index)?.1
                }
            };
        }
        Some(node.content())
    }

    fn root(&self) -> Node {
        let mut root = Folder::default();
        root.folder("meta-data", self.meta_data());
        root.bytes("user-data", &self.metadata.user_data);
        let mut identity = Folder::default();
        identity.leaf("document", self.identity_document());
        let mut dynamic = Folder::default();
        dynamic.folder("instance-identity", identity);
        root.folder("dynamic", dynamic);
        Node::Folder(root.0)
    }

    fn meta_data(&self) -> Folder {
        let data = &self.metadata;
        let mut folder = Folder::default();
        folder.leaf("ami-id", &data.image_id);
        folder.leaf("ami-launch-index", data.launch_index.to_string());
        folder.leaf("ami-manifest-path", "(unknown)");
        folder.folder("block-device-mapping", self.block_devices());
        folder.leaf("hostname", &data.local_hostname);
        folder.leaf("instance-action", "none");
        folder.leaf("instance-id", &self.instance_id);
        folder.leaf("instance-life-cycle", "on-demand");
        folder.leaf("instance-type", &data.instance_type);
        folder.leaf("local-hostname", &data.local_hostname);
        folder.leaf("profile", "default-hvm");
        folder.leaf("reservation-id", &data.reservation_id);
        folder.leaf("security-groups", data.security_groups.join("\n"));
        folder.leaf("system", "nitro");
        folder.leaf("public-hostname", &data.public_hostname);
        if let Some(primary) = self.interfaces.first() {
            folder.leaf("local-ipv4", primary.private_ipv4.to_string());
            folder.leaf("mac", primary.mac.to_string());
            folder.leaf("public-ipv4", text(primary.public_ipv4));
        }
        folder.folder("network", self.network());
        let mut placement = Folder::default();
        placement.leaf("availability-zone", &data.availability_zone);
        placement.leaf("availability-zone-id", &data.availability_zone_id);
        placement.leaf("region", &data.region);
        folder.folder("placement", placement);
        let mut services = Folder::default();
        services.leaf("domain", "amazonaws.com");
        services.leaf("partition", "aws");
        folder.folder("services", services);
        if !data.public_keys.is_empty() {
            let key = |openssh: &str| {
                let mut folder = Folder::default();
                folder.leaf("openssh-key", openssh);
                Node::Folder(folder.0)
            };
            let keys = data.public_keys.iter().map(|public| (public.name.clone(), key(&public.openssh))).collect();
            folder.0.insert("public-keys".into(), Node::Keys(keys));
        }
        if data.options.as_ref().is_some_and(|options| options.tags_enabled) {
            let mut instance = Folder::default();
            for (key, value) in data.tags.iter().filter(|(key, _)| is_listable(key)) {
                // A tag without a value is there all the same.
                instance.0.insert(key.clone(), Node::Leaf(value.clone().into_bytes()));
            }
            let mut tags = Folder::default();
            tags.folder("instance", instance);
            folder.folder("tags", tags);
        }
        folder
    }

    fn block_devices(&self) -> Folder {
        let mut folder = Folder::default();
        for boot in self.disks.iter().filter(|disk| disk.boot) {
            folder.leaf("ami", &boot.device_name);
            folder.leaf("root", &boot.device_name);
        }
        for (index, disk) in self.disks.iter().filter(|disk| !disk.boot).enumerate() {
            folder.leaf(&format!("ebs{}", index + 1), &disk.device_name);
        }
        folder
    }

    fn network(&self) -> Folder {
        let mut macs = Folder::default();
        for interface in &self.interfaces {
            macs.folder(&interface.mac.to_string(), self.interface(interface));
        }
        let mut interfaces = Folder::default();
        interfaces.folder("macs", macs);
        let mut network = Folder::default();
        network.folder("interfaces", interfaces);
        network
    }

    fn interface(&self, interface: &Interface) -> Folder {
        let data = &self.metadata;
        let mut folder = Folder::default();
        folder.leaf("device-number", interface.device_index.to_string());
        folder.leaf("interface-id", &interface.id);
        folder.leaf("local-hostname", &interface.local_hostname);
        let first = Address { private: interface.private_ipv4, public: interface.public_ipv4 };
        let addresses = || std::iter::once(&first).chain(&interface.secondary);
        folder.leaf("local-ipv4s", lines(addresses().map(|address| address.private)));
        folder.leaf("mac", interface.mac.to_string());
        folder.leaf("network-card", "0");
        folder.leaf("owner-id", &data.account_id);
        let associated: Vec<_> = addresses().filter_map(|address| Some((address.public?, address.private))).collect();
        if !associated.is_empty() {
            folder.leaf("public-ipv4s", lines(associated.iter().map(|(public, _)| *public)));
            let mut associations = Folder::default();
            for (public, private) in &associated {
                associations.leaf(&public.to_string(), private.to_string());
            }
            folder.folder("ipv4-associations", associations);
        }
        if interface.public_ipv4.is_some() && interface.device_index == 0 {
            folder.leaf("public-hostname", &data.public_hostname);
        }
        folder.leaf("security-group-ids", interface.security_group_ids.join("\n"));
        folder.leaf("security-groups", data.security_groups.join("\n"));
        folder.leaf("subnet-id", &interface.subnet_id);
        folder.leaf("subnet-ipv4-cidr-block", cidr(&interface.subnet));
        folder.leaf("vpc-id", &interface.vpc_id);
        let blocks: Vec<String> = interface.vpc_prefixes.iter().map(cidr).collect();
        folder.leaf("vpc-ipv4-cidr-block", blocks.first().cloned().unwrap_or_default());
        folder.leaf("vpc-ipv4-cidr-blocks", blocks.join("\n"));
        folder
    }

    /// The instance identity document, in the field order that EC2 prints.
    fn identity_document(&self) -> String {
        let data = &self.metadata;
        let pending = i64::try_from(data.pending_time_s).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
        let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
        let pending = pending.unwrap_or(time::OffsetDateTime::UNIX_EPOCH).format(format).unwrap_or_default();
        let document = Document {
            account_id: &data.account_id,
            // The hosts of this platform are of one architecture so far.
            architecture: "x86_64",
            availability_zone: &data.availability_zone,
            billing_products: None,
            devpay_product_codes: None,
            marketplace_product_codes: None,
            image_id: &data.image_id,
            instance_id: &self.instance_id,
            instance_type: &data.instance_type,
            kernel_id: None,
            pending_time: pending,
            private_ip: text(self.interfaces.first().map(|primary| primary.private_ipv4)),
            ramdisk_id: None,
            region: &data.region,
            version: "2017-09-30",
        };
        serde_json::to_string_pretty(&document).unwrap_or_default()
    }
}

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    account_id: &'a str,
    architecture: &'a str,
    availability_zone: &'a str,
    billing_products: Option<()>,
    devpay_product_codes: Option<()>,
    marketplace_product_codes: Option<()>,
    image_id: &'a str,
    instance_id: &'a str,
    instance_type: &'a str,
    kernel_id: Option<()>,
    pending_time: String,
    private_ip: String,
    ramdisk_id: Option<()>,
    region: &'a str,
    version: &'a str,
}

impl Node {
    fn content(self) -> Vec<u8> {
        match self {
            Self::Leaf(value) => value,
            Self::Folder(entries) => {
                let line = |(name, node): (String, Node)| if matches!(node, Node::Leaf(_)) { name } else { name + "/" };
                entries.into_iter().map(line).collect::<Vec<_>>().join("\n").into_bytes()
            }
            Self::Keys(keys) => {
                // A slash at the end would make cloud-init take the key for a folder.
                let shown = |name: &str| name.trim_end_matches(|c: char| c == '/' || c.is_whitespace()).to_owned();
                let line = |(index, (name, _)): (usize, (String, Node))| format!("{index}={}", shown(&name));
                keys.into_iter().enumerate().map(line).collect::<Vec<_>>().join("\n").into_bytes()
            }
        }
    }
}

#[derive(Default)]
struct Folder(BTreeMap<String, Node>);

impl Folder {
    /// An empty value has no name.
    fn leaf(&mut self, name: &str, value: impl Into<String>) {
        self.bytes(name, value.into().as_bytes());
    }

    fn bytes(&mut self, name: &str, value: &[u8]) {
        if !value.is_empty() {
            self.0.insert(name.into(), Node::Leaf(value.into()));
        }
    }

    /// An empty folder has no name.
    fn folder(&mut self, name: &str, folder: Self) {
        if !folder.0.is_empty() {
            self.0.insert(name.into(), Node::Folder(folder.0));
        }
    }
}

/// Which tag keys can stand in a listing: those that EC2 admits, less `=`,
/// because cloud-init reads `1=x` as the first of several keys and gives the
/// whole tree up when `1/openssh-key` is not there.
fn is_listable(key: &str) -> bool {
    let allowed = |c: char| c.is_alphanumeric() || "+-.,_:@".contains(c);
    !key.is_empty() && !matches!(key, "." | ".." | "_index") && key.chars().all(allowed)
}

fn text(address: Option<Ipv4Addr>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}

fn cidr(prefix: &Prefix) -> String {
    format!("{}/{}", prefix.nth(0), prefix.length)
}

fn lines(addresses: impl Iterator<Item = Ipv4Addr>) -> String {
    addresses.map(|address| address.to_string()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
pub(crate) mod tests {
    use super::*;
    use card_proto::card::{MetadataOptions, PublicKey};
    use proptest::prelude::*;

    /// An instance that has everything.
    pub(crate) fn rich() -> Subject {
        let metadata = Metadata {
            account_id: "123456789012".into(),
            region: "us-east-1".into(),
            availability_zone: "us-east-1a".into(),
            availability_zone_id: "use1-az1".into(),
            image_id: "ami-0123456789abcdef0".into(),
            instance_type: "t3.micro".into(),
            reservation_id: "r-0123456789abcdef0".into(),
            launch_index: 0,
            local_hostname: "ip-10-0-1-5.ec2.internal".into(),
            public_hostname: "ec2-198-51-100-20.compute-1.amazonaws.com".into(),
            security_groups: vec!["default".into(), "web".into()],
            public_keys: vec![PublicKey { name: "my key".into(), openssh: "ssh-ed25519 AAAA my key".into() }],
            user_data: b"#cloud-config\n".to_vec(),
            pending_time_s: 1_700_000_000,
            tags: [("Name".to_owned(), "a".to_owned()), ("empty".into(), String::new()), ("1=x".into(), "y".into())].into(),
            options: Some(MetadataOptions { enabled: true, tokens_required: true, hop_limit: 1, tags_enabled: true }),
        };
        let interface = Interface {
            id: "eni-1".into(),
            device_index: 0,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            private_ipv4: Ipv4Addr::new(10, 0, 1, 5),
            public_ipv4: Some(Ipv4Addr::new(198, 51, 100, 20)),
            secondary: vec![
                Address { private: Ipv4Addr::new(10, 0, 1, 6), public: Some(Ipv4Addr::new(198, 51, 100, 21)) },
                Address { private: Ipv4Addr::new(10, 0, 1, 7), public: None },
            ],
            local_hostname: "ip-10-0-1-5.ec2.internal".into(),
            vpc_id: "vpc-1".into(),
            subnet_id: "subnet-1".into(),
            subnet: Prefix::new(Ipv4Addr::new(10, 0, 1, 0), 24),
            vpc_prefixes: vec![Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16)],
            security_group_ids: vec!["sg-1".into(), "sg-2".into()],
        };
        let disk = |device_name: &str, boot| MappedDisk { device_name: device_name.into(), boot };
        Subject {
            instance_id: "i-0123456789abcdef0".into(),
            metadata,
            interfaces: vec![interface],
            disks: vec![disk("/dev/xvda", true), disk("/dev/sdf", false)],
        }
    }

    fn get(subject: &Subject, path: &str) -> Option<String> {
        subject.lookup(path).map(|content| String::from_utf8_lossy(&content).into_owned())
    }

    /// Reads `folder` as cloud-init does: every name of every listing, with the
    /// special case of the keys. Returns how many leaves answered.
    fn crawl(subject: &Subject, folder: &str) -> Result<usize, String> {
        let listing = get(subject, folder).ok_or_else(|| format!("{folder} is 404"))?;
        let mut leaves = 0;
        for line in listing.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if let Some(name) = line.strip_suffix('/') {
                leaves += crawl(subject, &format!("{folder}{name}/"))?;
                continue;
            }
            let index = line.split_once('=').and_then(|(index, _)| index.parse::<i64>().ok());
            let path = index.map_or(format!("{folder}{line}"), |index| format!("{folder}{index}/openssh-key"));
            get(subject, &path).ok_or_else(|| format!("{path} is 404"))?;
            leaves += 1;
        }
        Ok(leaves)
    }

    fn crawl_all(subject: &Subject) -> Result<usize, String> {
        let mut leaves = 0;
        for version in get(subject, "/").ok_or("no versions")?.lines() {
            for name in get(subject, &format!("/{version}/")).ok_or("a version is 404")?.lines() {
                get(subject, &format!("/{version}/{name}")).ok_or("a top name is 404")?;
                if name != "user-data" {
                    leaves += crawl(subject, &format!("/{version}/{name}/"))?;
                }
            }
        }
        Ok(leaves)
    }

    #[test]
    fn the_crawl_of_cloud_init_finds_everything() {
        let subject = rich();
        assert_eq!(get(&subject, "/2021-03-23/meta-data/instance-id").as_deref(), Some("i-0123456789abcdef0"));
        assert!(crawl(&subject, "/2021-03-23/meta-data/").unwrap() > 40);
        assert_eq!(get(&subject, "/2021-03-23/dynamic/instance-identity").as_deref(), Some("document"));
        assert_eq!(get(&subject, "/latest/meta-data/public-keys/").as_deref(), Some("0=my key"));
        assert_eq!(get(&subject, "/latest/meta-data/public-keys/0/").as_deref(), Some("openssh-key"));
        assert_eq!(get(&subject, "/latest/meta-data/public-keys/0/openssh-key").as_deref(), Some("ssh-ed25519 AAAA my key"));
        assert_eq!(get(&subject, "/latest/").as_deref(), Some("dynamic\nmeta-data\nuser-data"));
        assert_eq!(get(&subject, "/latest/meta-data/tags/instance/").as_deref(), Some("Name\nempty"));
        let mac = "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:01/";
        for (name, value) in [
            ("device-number", "0"),
            ("local-ipv4s", "10.0.1.5\n10.0.1.6\n10.0.1.7"),
            ("public-ipv4s", "198.51.100.20\n198.51.100.21"),
            ("ipv4-associations/198.51.100.20", "10.0.1.5"),
            ("ipv4-associations/198.51.100.21", "10.0.1.6"),
            ("subnet-ipv4-cidr-block", "10.0.1.0/24"),
            ("vpc-ipv4-cidr-block", "10.0.0.0/16"),
            ("owner-id", "123456789012"),
        ] {
            assert_eq!(get(&subject, &format!("{mac}{name}")).as_deref(), Some(value));
        }
        let document: serde_json::Value =
            serde_json::from_str(&get(&subject, "/latest/dynamic/instance-identity/document").unwrap()).unwrap();
        assert_eq!(document["pendingTime"], "2023-11-14T22:13:20Z");
        assert_eq!(document["privateIp"], "10.0.1.5");
        assert_eq!(document["instanceType"], "t3.micro");
    }

    #[test]
    fn slashes_are_forgiven_and_unknown_names_are_not() {
        let subject = rich();
        let id = get(&subject, "/latest/meta-data/instance-id");
        assert!(id.is_some());
        for path in ["latest/meta-data/instance-id", "//latest//meta-data///instance-id", "/latest/meta-data/instance-id/"] {
            assert_eq!(get(&subject, path), id, "{path}");
        }
        for path in [
            "/latest/meta-data/nothing",
            "/latest/meta-data/instance-id/more",
            "/latest/meta-data/iam/security-credentials/",
            "/latest/meta-data/spot/instance-action",
            "/latest/meta-data/public-keys/1/openssh-key",
            "/latest/meta-data/public-keys/0=my key",
            "/latest/../latest",
            "/1999-01-01/meta-data/",
        ] {
            assert_eq!(get(&subject, path), None, "{path}");
        }
    }

    #[test]
    fn a_key_named_like_a_folder_is_still_a_key() {
        let mut subject = rich();
        subject.metadata.public_keys[0].name = "a/b/ / ".into();
        assert_eq!(get(&subject, "/latest/meta-data/public-keys/").as_deref(), Some("0=a/b"));
        crawl_all(&subject).unwrap();
    }

    #[test]
    fn what_an_instance_does_not_have_has_no_name() {
        let mut subject = rich();
        subject.metadata.user_data.clear();
        subject.metadata.public_keys.clear();
        subject.metadata.public_hostname.clear();
        subject.metadata.tags.clear();
        subject.interfaces[0].public_ipv4 = None;
        assert_eq!(get(&subject, "/latest").as_deref(), Some("dynamic\nmeta-data"));
        let names = get(&subject, "/latest/meta-data/").unwrap();
        for absent in ["public-keys/", "public-ipv4", "public-hostname", "tags/"] {
            assert!(!names.lines().any(|name| name == absent), "{absent}");
            assert_eq!(get(&subject, &format!("/latest/meta-data/{absent}")), None);
        }
        crawl_all(&subject).unwrap();
    }

    prop_compose! {
        /// Instances in every state: with and without each thing that one may lack.
        fn subjects()(
            has in prop::collection::vec(any::<bool>(), 16),
            tags in prop::collection::hash_map("[ -~é]{0,12}", "[ -~]{0,8}", 0..6),
            keys in prop::collection::vec("[a-zA-Z0-9 =/_.-]{1,12}", 0..3),
            groups in prop::collection::vec("[ -~]{1,12}", 0..3),
            interfaces in 0..3_usize,
            disks in 0..4_usize,
        ) -> Subject {
            let mut subject = rich();
            let blank = |flag: usize, text: &mut String| if has[flag] { text.clear() };
            let data = &mut subject.metadata;
            blank(0, &mut data.public_hostname);
            blank(1, &mut data.local_hostname);
            blank(2, &mut data.reservation_id);
            blank(3, &mut data.availability_zone_id);
            blank(4, &mut data.image_id);
            if has[5] { data.user_data.clear() }
            data.options.as_mut().unwrap().tags_enabled = has[6];
            data.tags = tags;
            data.public_keys = keys.into_iter().map(|name| PublicKey { name, openssh: "ssh-rsa A".into() }).collect();
            data.security_groups = groups;
            let mut interface = subject.interfaces.pop().unwrap();
            if has[7] { interface.public_ipv4 = None }
            if has[8] { interface.vpc_prefixes.clear() }
            if has[9] { interface.secondary.clear() }
            if has[9] { interface.security_group_ids.clear() }
            subject.interfaces = (0..interfaces).map(|index| {
                let mac = Mac([2, 0, 0, 0, 0, index as u8]);
                Interface { device_index: index as u32, mac, ..interface.clone() }
            }).collect();
            subject.disks = (0..disks).map(|index| MappedDisk { device_name: format!("/dev/sd{index}"), boot: index == 0 && has[10] }).collect();
            subject
        }
    }

    proptest! {
        #[test]
        fn every_listed_name_answers_in_every_state(subject in subjects()) {
            prop_assert!(crawl_all(&subject).is_ok(), "{:?}", crawl_all(&subject));
        }
    }
}
