//! The catalogue of instance types: every name of the public service model with the figures that EC2 publishes.
//!
//! The facts stand in `control/data/instance_types.tsv`, one type a line; the head of that file explains its columns. They are parsed
//! on first use and kept for good. [`find`] looks a type up in constant time.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::LazyLock;

use super::filter::{Filters, Page};
use super::tag::TagMap;
use crate::error::ApiError;
use crate::shapes::{
    DefaultConnectionTrackingConfiguration, DescribeInstanceTypeOfferingsRequest, DescribeInstanceTypeOfferingsResult,
    DescribeInstanceTypesRequest, DescribeInstanceTypesResult, DiskInfo, EbsCardInfo, EbsInfo, EbsOptimizedInfo, EfaInfo, FpgaDeviceInfo,
    FpgaDeviceMemoryInfo, FpgaInfo, GpuDeviceInfo, GpuDeviceMemoryInfo, GpuInfo, InferenceAcceleratorInfo, InferenceDeviceInfo,
    InferenceDeviceMemoryInfo, InstanceStorageInfo, InstanceTypeInfo, InstanceTypeOffering, MediaAcceleratorInfo, MediaDeviceInfo,
    MediaDeviceMemoryInfo, MemoryInfo, NetworkCardInfo, NetworkInfo, NeuronDeviceCoreInfo, NeuronDeviceInfo, NeuronDeviceMemoryInfo,
    NeuronInfo, NitroTpmInfo, PlacementGroupInfo, ProcessorInfo, VCpuInfo,
};
use crate::world::Call;

const FACTS: &str = include_str!("../../data/instance_types.tsv");
/// The longest page of DescribeInstanceTypes, and its length when the request names none.
const MOST_RESULTS: i32 = 100;

/// What a type is made of.
#[allow(missing_docs)] // the names are those of the columns
pub struct InstanceType {
    pub name: &'static str,
    features: Vec<&'static str>,
    /// `nitro`, `xen`, or none on bare metal.
    hypervisor: Option<&'static str>,
    pub architectures: Vec<&'static str>,
    manufacturer: &'static str,
    clock_ghz: Option<f64>,
    processor_features: Vec<&'static str>,
    pub vcpus: u32,
    pub cores: u32,
    pub threads_per_core: u32,
    valid_cores: Vec<i32>,
    valid_threads: Vec<i32>,
    pub memory_mib: u64,
    boot_modes: Vec<&'static str>,
    pub network_performance: &'static str,
    pub max_interfaces: u32,
    pub ipv4_per_interface: u32,
    ipv6_per_interface: i32,
    ena: &'static str,
    efa_interfaces: i32,
    tcp_established_timeout_s: i32,
    network_cards: Vec<NetworkCard>,
    ebs_optimized: &'static str,
    ebs_nvme: &'static str,
    pub ebs_attachments: u32,
    ebs_limit: &'static str,
    ebs_bandwidth: Option<EbsBandwidth>,
    ebs_cards: Vec<EbsBandwidth>,
    instance_store: Option<InstanceStore>,
    devices: Vec<Vec<&'static str>>,
}

struct NetworkCard {
    performance: &'static str,
    max_interfaces: i32,
    baseline_gbps: Option<f64>,
    peak_gbps: Option<f64>,
    default_queues: Option<i32>,
    max_queues: Option<i32>,
    max_queues_per_interface: Option<i32>,
    flexible_interfaces: Option<i32>,
}

#[derive(Clone, Copy)]
struct EbsBandwidth {
    baseline_mbps: i32,
    baseline_mb_s: f64,
    baseline_iops: i32,
    maximum_mbps: i32,
    maximum_mb_s: f64,
    maximum_iops: i32,
}

struct InstanceStore {
    disks: i32,
    size_gb: i64,
    medium: &'static str,
    nvme: &'static str,
    encryption: &'static str,
}

struct Catalogue {
    /// By name.
    types: Vec<InstanceType>,
    places: HashMap<&'static str, usize, foldhash::fast::RandomState>,
}

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| {
    let lines = FACTS.lines().filter(|line| !line.starts_with('#')).skip(1);
    let mut types: Vec<InstanceType> = lines.filter_map(parse).collect();
    types.sort_by_key(|kind| kind.name);
    let places = types.iter().enumerate().map(|(place, kind)| (kind.name, place)).collect();
    Catalogue { types, places }
});

/// Every type, by name.
pub fn all() -> &'static [InstanceType] {
    &CATALOGUE.types
}

/// The type of a name.
pub fn find(name: &str) -> Option<&'static InstanceType> {
    CATALOGUE.places.get(name).and_then(|place| CATALOGUE.types.get(*place))
}

impl InstanceType {
    fn has(&self, feature: &str) -> bool {
        self.features.contains(&feature)
    }

    /// Whether it runs without a hypervisor.
    pub fn is_bare_metal(&self) -> bool {
        self.has("metal")
    }

    /// Whether its CPU share is earned in credits.
    pub fn is_burstable(&self) -> bool {
        self.has("burstable")
    }
}

/// Whether an image of this architecture runs on a type.
///
/// # Errors
/// `InvalidParameterValue` when it does not.
pub fn check_architecture(kind: &InstanceType, architecture: &str) -> Result<(), ApiError> {
    if kind.architectures.contains(&architecture) {
        return Ok(());
    }
    Err(ApiError::invalid_value(format!(
        "The architecture '{}' of the specified instance type does not match the architecture '{architecture}' of the specified AMI. Specify an instance type and an AMI that have matching architectures, and try again.",
        kind.architectures.join(",")
    )))
}

/// Reads one line of the file; the test of this module holds that every line reads.
fn parse(line: &'static str) -> Option<InstanceType> {
    let mut columns = line.split('\t');
    let mut next = || columns.next();
    let kind = InstanceType {
        name: next()?,
        features: list(next()?),
        hypervisor: present(next()?),
        architectures: list(next()?),
        manufacturer: next()?,
        clock_ghz: optional(next()?)?,
        processor_features: list(next()?),
        vcpus: next()?.parse().ok()?,
        cores: next()?.parse().ok()?,
        threads_per_core: next()?.parse().ok()?,
        valid_cores: numbers(next()?)?,
        valid_threads: numbers(next()?)?,
        memory_mib: next()?.parse().ok()?,
        boot_modes: list(next()?),
        network_performance: next()?,
        max_interfaces: next()?.parse().ok()?,
        ipv4_per_interface: next()?.parse().ok()?,
        ipv6_per_interface: next()?.parse().ok()?,
        ena: next()?,
        efa_interfaces: next()?.parse().ok()?,
        tcp_established_timeout_s: next()?.parse().ok()?,
        network_cards: network_cards(next()?)?,
        ebs_optimized: next()?,
        ebs_nvme: next()?,
        ebs_attachments: next()?.parse().ok()?,
        ebs_limit: next()?,
        ebs_bandwidth: None,
        ebs_cards: Vec::new(),
        instance_store: None,
        devices: Vec::new(),
    };
    let bandwidth = records(next()?).map(ebs_bandwidth).collect::<Option<Vec<_>>>()?;
    let instance_store = match present(next()?) {
        Some(text) => Some(instance_store(text)?),
        None => None,
    };
    let devices = records(next()?).map(|device| device.split(':').collect()).collect();
    let ebs_cards = bandwidth.iter().skip(1).copied().collect();
    Some(InstanceType { ebs_bandwidth: bandwidth.first().copied(), ebs_cards, instance_store, devices, ..kind })
}

fn present(text: &'static str) -> Option<&'static str> {
    Some(text).filter(|text| *text != "-" && !text.is_empty())
}

/// A value that may be absent; the outer `None` says that it does not parse.
fn optional<T: FromStr>(text: &'static str) -> Option<Option<T>> {
    match present(text) {
        Some(text) => text.parse().ok().map(Some),
        None => Some(None),
    }
}

fn list(text: &'static str) -> Vec<&'static str> {
    present(text).into_iter().flat_map(|text| text.split(',')).collect()
}

fn records(text: &'static str) -> impl Iterator<Item = &'static str> {
    present(text).into_iter().flat_map(|text| text.split(';'))
}

/// `1,2` or `2-48/2`.
fn numbers(text: &'static str) -> Option<Vec<i32>> {
    let mut all = Vec::new();
    for part in list(text) {
        let (range, step) = part.split_once('/').unwrap_or((part, "1"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let step = step.parse::<usize>().ok().filter(|step| *step > 0)?;
        all.extend((first.parse::<i32>().ok()?..=last.parse::<i32>().ok()?).step_by(step));
    }
    Some(all)
}

fn network_cards(text: &'static str) -> Option<Vec<NetworkCard>> {
    let mut cards = Vec::new();
    for record in records(text) {
        let (times, record) = record.split_once('*').unwrap_or(("1", record));
        for _ in 0..times.parse::<usize>().ok()? {
            let mut fields = record.split(':');
            let mut next = || fields.next();
            cards.push(NetworkCard {
                performance: next()?,
                max_interfaces: next()?.parse().ok()?,
                baseline_gbps: optional(next()?)?,
                peak_gbps: optional(next()?)?,
                default_queues: optional(next()?)?,
                max_queues: optional(next()?)?,
                max_queues_per_interface: optional(next()?)?,
                flexible_interfaces: optional(next()?)?,
            });
        }
    }
    Some(cards)
}

fn ebs_bandwidth(text: &'static str) -> Option<EbsBandwidth> {
    let mut fields = text.split(':');
    let mut next = || fields.next();
    Some(EbsBandwidth {
        baseline_mbps: next()?.parse().ok()?,
        baseline_mb_s: next()?.parse().ok()?,
        baseline_iops: next()?.parse().ok()?,
        maximum_mbps: next()?.parse().ok()?,
        maximum_mb_s: next()?.parse().ok()?,
        maximum_iops: next()?.parse().ok()?,
    })
}

fn instance_store(text: &'static str) -> Option<InstanceStore> {
    let mut fields = text.split(':');
    let mut next = || fields.next();
    Some(InstanceStore {
        disks: next()?.parse().ok()?,
        size_gb: next()?.parse().ok()?,
        medium: next()?,
        nvme: next()?,
        encryption: next()?,
    })
}

/// DescribeInstanceTypes: up to 100 types a page.
///
/// # Errors
/// `InvalidInstanceType` for names that do not exist, and those of filters and pages.
pub fn describe_instance_types(
    _call: &mut Call<'_>,
    request: DescribeInstanceTypesRequest,
) -> Result<DescribeInstanceTypesResult, ApiError> {
    let missing: Vec<&str> = request.instance_types.iter().map(String::as_str).filter(|name| find(name).is_none()).collect();
    if !missing.is_empty() {
        let message = format!("The following supplied instance types do not exist: [{}]", missing.join(", "));
        return Err(ApiError::new("InvalidInstanceType", message));
    }
    let filters = Filters::new(request.filters, NAMES)?;
    let most = request.max_results.unwrap_or(MOST_RESULTS);
    let page = Page::new("DescribeInstanceTypes", Some(most), request.next_token.as_deref(), MOST_RESULTS)?;
    let named = |kind: &&InstanceType| request.instance_types.is_empty() || request.instance_types.iter().any(|name| name == kind.name);
    let passing =
        all().iter().filter(named).filter(|kind| filters.is_empty() || filters.pass(&TagMap::new(), |name, test| field(kind, name, test)));
    let (instance_types, next_token) = page.take(passing.map(|kind| (kind.name.to_owned(), kind)));
    Ok(DescribeInstanceTypesResult { instance_types: instance_types.into_iter().map(shape).collect(), next_token })
}

const NAMES: &[&str] = &[
    "auto-recovery-supported",
    "bare-metal",
    "burstable-performance-supported",
    "current-generation",
    "dedicated-hosts-supported",
    "ebs-info.attachment-limit-type",
    "ebs-info.ebs-optimized-info.baseline-bandwidth-in-mbps",
    "ebs-info.ebs-optimized-info.baseline-iops",
    "ebs-info.ebs-optimized-info.baseline-throughput-in-mbps",
    "ebs-info.ebs-optimized-info.maximum-bandwidth-in-mbps",
    "ebs-info.ebs-optimized-info.maximum-iops",
    "ebs-info.ebs-optimized-info.maximum-throughput-in-mbps",
    "ebs-info.ebs-optimized-support",
    "ebs-info.encryption-support",
    "ebs-info.maximum-ebs-attachments",
    "ebs-info.nvme-support",
    "free-tier-eligible",
    "hibernation-supported",
    "hypervisor",
    "instance-storage-info.disk.count",
    "instance-storage-info.disk.size-in-gb",
    "instance-storage-info.disk.type",
    "instance-storage-info.encryption-support",
    "instance-storage-info.nvme-support",
    "instance-storage-info.total-size-in-gb",
    "instance-storage-supported",
    "instance-type",
    "memory-info.size-in-mib",
    "network-info.bandwidth-weightings",
    "network-info.efa-info.maximum-efa-interfaces",
    "network-info.efa-supported",
    "network-info.ena-support",
    "network-info.encryption-in-transit-supported",
    "network-info.flexible-ena-queues-support",
    "network-info.ipv4-addresses-per-interface",
    "network-info.ipv6-addresses-per-interface",
    "network-info.ipv6-supported",
    "network-info.maximum-network-cards",
    "network-info.maximum-network-interfaces",
    "network-info.network-performance",
    "nitro-enclaves-support",
    "nitro-tpm-info.supported-versions",
    "nitro-tpm-support",
    "processor-info.supported-architecture",
    "processor-info.supported-features",
    "processor-info.sustained-clock-speed-in-ghz",
    "reboot-migration-support",
    "supported-boot-mode",
    "supported-root-device-type",
    "supported-usage-class",
    "supported-virtualization-type",
    "vcpu-info.default-cores",
    "vcpu-info.default-threads-per-core",
    "vcpu-info.default-vcpus",
    "vcpu-info.valid-cores",
    "vcpu-info.valid-threads-per-core",
];

fn field(kind: &InstanceType, name: &str, test: &dyn Fn(&str) -> bool) -> bool {
    let flag = |feature| test(if kind.has(feature) { "true" } else { "false" });
    let support = |feature| test(supported(kind, feature));
    let any = |values: &[&str]| values.iter().any(|value| test(value));
    let ebs = |value: fn(&EbsBandwidth) -> String| kind.ebs_bandwidth.as_ref().is_some_and(|ebs| test(&value(ebs)));
    let store = |value: fn(&InstanceStore) -> String| kind.instance_store.as_ref().is_some_and(|store| test(&value(store)));
    match name {
        "auto-recovery-supported" => flag("recovery"),
        "bare-metal" => flag("metal"),
        "burstable-performance-supported" => flag("burstable"),
        "current-generation" => flag("current"),
        "dedicated-hosts-supported" => flag("dedicated"),
        "ebs-info.attachment-limit-type" => test(kind.ebs_limit),
        "ebs-info.ebs-optimized-info.baseline-bandwidth-in-mbps" => ebs(|ebs| ebs.baseline_mbps.to_string()),
        "ebs-info.ebs-optimized-info.baseline-iops" => ebs(|ebs| ebs.baseline_iops.to_string()),
        "ebs-info.ebs-optimized-info.baseline-throughput-in-mbps" => ebs(|ebs| ebs.baseline_mb_s.to_string()),
        "ebs-info.ebs-optimized-info.maximum-bandwidth-in-mbps" => ebs(|ebs| ebs.maximum_mbps.to_string()),
        "ebs-info.ebs-optimized-info.maximum-iops" => ebs(|ebs| ebs.maximum_iops.to_string()),
        "ebs-info.ebs-optimized-info.maximum-throughput-in-mbps" => ebs(|ebs| ebs.maximum_mb_s.to_string()),
        "ebs-info.ebs-optimized-support" => test(kind.ebs_optimized),
        "ebs-info.encryption-support" => test("supported"),
        "ebs-info.maximum-ebs-attachments" => test(&kind.ebs_attachments.to_string()),
        "ebs-info.nvme-support" => test(kind.ebs_nvme),
        "free-tier-eligible" => flag("free-tier"),
        "hibernation-supported" => flag("hibernation"),
        "hypervisor" => kind.hypervisor.is_some_and(test),
        "instance-storage-info.disk.count" => store(|store| store.disks.to_string()),
        "instance-storage-info.disk.size-in-gb" => store(|store| store.size_gb.to_string()),
        "instance-storage-info.disk.type" => store(|store| store.medium.to_owned()),
        "instance-storage-info.encryption-support" => store(|store| store.encryption.to_owned()),
        "instance-storage-info.nvme-support" => store(|store| store.nvme.to_owned()),
        "instance-storage-info.total-size-in-gb" => store(|store| total_gb(store).to_string()),
        "instance-storage-supported" => test(if kind.instance_store.is_some() { "true" } else { "false" }),
        "instance-type" => test(kind.name),
        "memory-info.size-in-mib" => test(&kind.memory_mib.to_string()),
        "network-info.bandwidth-weightings" => kind.has("weighting") && any(&WEIGHTINGS),
        "network-info.efa-info.maximum-efa-interfaces" => kind.efa_interfaces > 0 && test(&kind.efa_interfaces.to_string()),
        "network-info.efa-supported" => test(if kind.efa_interfaces > 0 { "true" } else { "false" }),
        "network-info.ena-support" => test(kind.ena),
        "network-info.encryption-in-transit-supported" => flag("encrypted"),
        "network-info.flexible-ena-queues-support" => support("queues"),
        "network-info.ipv4-addresses-per-interface" => test(&kind.ipv4_per_interface.to_string()),
        "network-info.ipv6-addresses-per-interface" => test(&kind.ipv6_per_interface.to_string()),
        "network-info.ipv6-supported" => flag("ipv6"),
        "network-info.maximum-network-cards" => test(&kind.network_cards.len().to_string()),
        "network-info.maximum-network-interfaces" => test(&kind.max_interfaces.to_string()),
        "network-info.network-performance" => test(kind.network_performance),
        "nitro-enclaves-support" => support("enclaves"),
        "nitro-tpm-info.supported-versions" => kind.has("tpm") && test(TPM_VERSION),
        "nitro-tpm-support" => support("tpm"),
        "processor-info.supported-architecture" => any(&kind.architectures),
        "processor-info.supported-features" => any(&kind.processor_features),
        "processor-info.sustained-clock-speed-in-ghz" => kind.clock_ghz.is_some_and(|clock| test(&clock.to_string())),
        "reboot-migration-support" => support("migration"),
        "supported-boot-mode" => any(&kind.boot_modes),
        "supported-root-device-type" => any(&root_devices(kind)),
        "supported-usage-class" => any(&usage_classes(kind)),
        "supported-virtualization-type" => any(&virtualization_types(kind)),
        "vcpu-info.default-cores" => test(&kind.cores.to_string()),
        "vcpu-info.default-threads-per-core" => test(&kind.threads_per_core.to_string()),
        "vcpu-info.default-vcpus" => test(&kind.vcpus.to_string()),
        "vcpu-info.valid-cores" => kind.valid_cores.iter().any(|cores| test(&cores.to_string())),
        "vcpu-info.valid-threads-per-core" => kind.valid_threads.iter().any(|threads| test(&threads.to_string())),
        _ => false,
    }
}

const WEIGHTINGS: [&str; 3] = ["default", "vpc-1", "ebs-1"];
const TPM_VERSION: &str = "2.0";

fn supported(kind: &InstanceType, feature: &str) -> &'static str {
    if kind.has(feature) { "supported" } else { "unsupported" }
}

fn total_gb(store: &InstanceStore) -> i64 {
    store.size_gb.saturating_mul(store.disks.into())
}

fn root_devices(kind: &InstanceType) -> Vec<&'static str> {
    if kind.has("instance-store") { vec!["ebs", "instance-store"] } else { vec!["ebs"] }
}

fn usage_classes(kind: &InstanceType) -> Vec<&'static str> {
    ["capacity-block", "on-demand", "spot"].into_iter().filter(|class| kind.has(class)).collect()
}

fn virtualization_types(kind: &InstanceType) -> Vec<&'static str> {
    if kind.has("paravirtual") { vec!["hvm", "paravirtual"] } else { vec!["hvm"] }
}

fn words(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

fn word(value: &str) -> Option<String> {
    Some(value.to_owned())
}

fn int(value: impl TryInto<i32>) -> Option<i32> {
    value.try_into().ok()
}

fn shape(kind: &'static InstanceType) -> InstanceTypeInfo {
    let strategies: &[&str] = if kind.has("cluster") { &["cluster", "partition", "spread"] } else { &["partition", "spread"] };
    InstanceTypeInfo {
        instance_type: word(kind.name),
        current_generation: Some(kind.has("current")),
        free_tier_eligible: Some(kind.has("free-tier")),
        supported_usage_classes: words(&usage_classes(kind)),
        supported_root_device_types: words(&root_devices(kind)),
        supported_virtualization_types: words(&virtualization_types(kind)),
        bare_metal: Some(kind.is_bare_metal()),
        hypervisor: kind.hypervisor.map(str::to_owned),
        processor_info: Some(ProcessorInfo {
            supported_architectures: words(&kind.architectures),
            sustained_clock_speed_in_ghz: kind.clock_ghz,
            supported_features: words(&kind.processor_features),
            manufacturer: word(kind.manufacturer),
        }),
        v_cpu_info: Some(VCpuInfo {
            default_v_cpus: int(kind.vcpus),
            default_cores: int(kind.cores),
            default_threads_per_core: int(kind.threads_per_core),
            valid_cores: kind.valid_cores.clone(),
            valid_threads_per_core: kind.valid_threads.clone(),
        }),
        memory_info: Some(MemoryInfo { size_in_mi_b: i64::try_from(kind.memory_mib).ok() }),
        instance_storage_supported: Some(kind.instance_store.is_some()),
        instance_storage_info: kind.instance_store.as_ref().map(store_shape),
        ebs_info: Some(ebs_shape(kind)),
        network_info: Some(network_shape(kind)),
        gpu_info: gpu_shape(kind),
        fpga_info: fpga_shape(kind),
        inference_accelerator_info: inference_shape(kind),
        media_accelerator_info: media_shape(kind),
        neuron_info: neuron_shape(kind),
        placement_group_info: Some(PlacementGroupInfo { supported_strategies: words(strategies) }),
        hibernation_supported: Some(kind.has("hibernation")),
        burstable_performance_supported: Some(kind.is_burstable()),
        dedicated_hosts_supported: Some(kind.has("dedicated")),
        auto_recovery_supported: Some(kind.has("recovery")),
        supported_boot_modes: words(&kind.boot_modes),
        nitro_enclaves_support: word(supported(kind, "enclaves")),
        nitro_tpm_support: word(supported(kind, "tpm")),
        nitro_tpm_info: kind.has("tpm").then(|| NitroTpmInfo { supported_versions: words(&[TPM_VERSION]) }),
        phc_support: word(supported(kind, "phc")),
        reboot_migration_support: word(supported(kind, "migration")),
        supported_in_region: Some(true),
    }
}

fn store_shape(store: &InstanceStore) -> InstanceStorageInfo {
    InstanceStorageInfo {
        total_size_in_gb: Some(total_gb(store)),
        disks: vec![DiskInfo { count: Some(store.disks), size_in_gb: Some(store.size_gb), r#type: word(store.medium) }],
        nvme_support: word(store.nvme),
        encryption_support: word(store.encryption),
    }
}

fn ebs_shape(kind: &InstanceType) -> EbsInfo {
    let optimized = |ebs: EbsBandwidth| EbsOptimizedInfo {
        baseline_bandwidth_in_mbps: Some(ebs.baseline_mbps),
        baseline_throughput_in_m_bps: Some(ebs.baseline_mb_s),
        baseline_iops: Some(ebs.baseline_iops),
        maximum_bandwidth_in_mbps: Some(ebs.maximum_mbps),
        maximum_throughput_in_m_bps: Some(ebs.maximum_mb_s),
        maximum_iops: Some(ebs.maximum_iops),
    };
    let card = |(index, ebs): (usize, &EbsBandwidth)| EbsCardInfo {
        ebs_card_index: int(index),
        baseline_bandwidth_in_mbps: Some(ebs.baseline_mbps),
        baseline_throughput_in_m_bps: Some(ebs.baseline_mb_s),
        baseline_iops: Some(ebs.baseline_iops),
        maximum_bandwidth_in_mbps: Some(ebs.maximum_mbps),
        maximum_throughput_in_m_bps: Some(ebs.maximum_mb_s),
        maximum_iops: Some(ebs.maximum_iops),
    };
    EbsInfo {
        ebs_optimized_support: word(kind.ebs_optimized),
        encryption_support: word("supported"),
        ebs_optimized_info: kind.ebs_bandwidth.map(optimized),
        nvme_support: word(kind.ebs_nvme),
        maximum_ebs_attachments: int(kind.ebs_attachments),
        attachment_limit_type: word(kind.ebs_limit),
        maximum_ebs_cards: if kind.ebs_cards.is_empty() { None } else { int(kind.ebs_cards.len()) },
        ebs_cards: kind.ebs_cards.iter().enumerate().map(card).collect(),
    }
}

fn network_shape(kind: &InstanceType) -> NetworkInfo {
    let card = |(index, card): (usize, &NetworkCard)| NetworkCardInfo {
        network_card_index: int(index),
        network_performance: word(card.performance),
        maximum_network_interfaces: Some(card.max_interfaces),
        baseline_bandwidth_in_gbps: card.baseline_gbps,
        peak_bandwidth_in_gbps: card.peak_gbps,
        default_ena_queue_count_per_interface: card.default_queues,
        maximum_ena_queue_count: card.max_queues,
        maximum_ena_queue_count_per_interface: card.max_queues_per_interface,
        additional_flexible_network_interfaces: card.flexible_interfaces,
    };
    NetworkInfo {
        network_performance: word(kind.network_performance),
        maximum_network_interfaces: int(kind.max_interfaces),
        maximum_network_cards: int(kind.network_cards.len()),
        default_network_card_index: Some(0),
        network_cards: kind.network_cards.iter().enumerate().map(card).collect(),
        ipv4_addresses_per_interface: int(kind.ipv4_per_interface),
        ipv6_addresses_per_interface: Some(kind.ipv6_per_interface),
        ipv6_supported: Some(kind.has("ipv6")),
        ena_support: word(kind.ena),
        efa_supported: Some(kind.efa_interfaces > 0),
        efa_info: (kind.efa_interfaces > 0).then_some(EfaInfo { maximum_efa_interfaces: Some(kind.efa_interfaces) }),
        encryption_in_transit_supported: Some(kind.has("encrypted")),
        ena_srd_supported: Some(kind.has("srd")),
        bandwidth_weightings: if kind.has("weighting") { words(&WEIGHTINGS) } else { Vec::new() },
        flexible_ena_queues_support: word(supported(kind, "queues")),
        connection_tracking_configuration: Some(DefaultConnectionTrackingConfiguration {
            default_tcp_established_timeout: Some(kind.tcp_established_timeout_s),
            default_udp_timeout: Some(30),
            default_udp_stream_timeout: Some(180),
        }),
        secondary_network_supported: Some(false),
        ..Default::default()
    }
}

/// The devices of one sort, as rows of fields after the sort's name.
fn devices<'a>(kind: &'a InstanceType, sort: &'a str) -> impl Iterator<Item = &'a [&'static str]> {
    kind.devices.iter().filter_map(move |device| device.split_first().filter(|(first, _)| **first == sort).map(|(_, rest)| rest))
}

/// The field number `index` of a device, as a number.
fn figure<T: FromStr>(device: &[&'static str], index: usize) -> Option<T> {
    device.get(index)?.parse().ok()
}

fn text(device: &[&'static str], index: usize) -> Option<String> {
    device.get(index).map(|text| (*text).to_owned())
}

/// Memory of all devices of a sort: count (at least one, since a part of a device counts as 0 devices) times size.
fn total_mib(kind: &InstanceType, sort: &str) -> Option<i32> {
    let of = |device: &[&'static str]| Some(figure::<i32>(device, 0)?.max(1).saturating_mul(figure(device, 3)?));
    devices(kind, sort).map(of).sum()
}

fn gpu_shape(kind: &InstanceType) -> Option<GpuInfo> {
    let gpu = |device: &[&'static str]| GpuDeviceInfo {
        count: figure(device, 0),
        manufacturer: text(device, 1),
        name: text(device, 2),
        memory_info: Some(GpuDeviceMemoryInfo { size_in_mi_b: figure(device, 3) }),
        gpu_partition_size: figure(device, 4),
        logical_gpu_count: figure(device, 5),
        workloads: device.get(6).filter(|text| !text.is_empty()).into_iter().flat_map(|text| text.split('+')).map(str::to_owned).collect(),
    };
    let gpus: Vec<_> = devices(kind, "gpu").map(gpu).collect();
    (!gpus.is_empty()).then(|| GpuInfo { gpus, total_gpu_memory_in_mi_b: total_mib(kind, "gpu") })
}

fn fpga_shape(kind: &InstanceType) -> Option<FpgaInfo> {
    let fpga = |device: &[&'static str]| FpgaDeviceInfo {
        count: figure(device, 0),
        manufacturer: text(device, 1),
        name: text(device, 2),
        memory_info: Some(FpgaDeviceMemoryInfo { size_in_mi_b: figure(device, 3) }),
    };
    let fpgas: Vec<_> = devices(kind, "fpga").map(fpga).collect();
    (!fpgas.is_empty()).then(|| FpgaInfo { fpgas, total_fpga_memory_in_mi_b: total_mib(kind, "fpga") })
}

fn inference_shape(kind: &InstanceType) -> Option<InferenceAcceleratorInfo> {
    let accelerator = |device: &[&'static str]| InferenceDeviceInfo {
        count: figure(device, 0),
        manufacturer: text(device, 1),
        name: text(device, 2),
        memory_info: Some(InferenceDeviceMemoryInfo { size_in_mi_b: figure(device, 3) }),
    };
    let accelerators: Vec<_> = devices(kind, "inference").map(accelerator).collect();
    (!accelerators.is_empty())
        .then(|| InferenceAcceleratorInfo { accelerators, total_inference_memory_in_mi_b: total_mib(kind, "inference") })
}

fn media_shape(kind: &InstanceType) -> Option<MediaAcceleratorInfo> {
    let accelerator = |device: &[&'static str]| MediaDeviceInfo {
        count: figure(device, 0),
        manufacturer: text(device, 1),
        name: text(device, 2),
        memory_info: Some(MediaDeviceMemoryInfo { size_in_mi_b: figure(device, 3) }),
    };
    let accelerators: Vec<_> = devices(kind, "media").map(accelerator).collect();
    (!accelerators.is_empty()).then(|| MediaAcceleratorInfo { accelerators, total_media_memory_in_mi_b: total_mib(kind, "media") })
}

fn neuron_shape(kind: &InstanceType) -> Option<NeuronInfo> {
    let neuron = |device: &[&'static str]| NeuronDeviceInfo {
        count: figure(device, 0),
        name: text(device, 2),
        memory_info: Some(NeuronDeviceMemoryInfo { size_in_mi_b: figure(device, 3) }),
        core_info: Some(NeuronDeviceCoreInfo { count: figure(device, 4), version: figure(device, 5) }),
    };
    let neuron_devices: Vec<_> = devices(kind, "neuron").map(neuron).collect();
    (!neuron_devices.is_empty()).then(|| NeuronInfo { neuron_devices, total_neuron_device_memory_in_mi_b: total_mib(kind, "neuron") })
}

/// DescribeInstanceTypeOfferings: every type is offered in every zone of the region.
///
/// # Errors
/// `InvalidParameterValue` for an unknown kind of location, and those of filters and pages.
pub fn describe_instance_type_offerings(
    call: &mut Call<'_>,
    request: DescribeInstanceTypeOfferingsRequest,
) -> Result<DescribeInstanceTypeOfferingsResult, ApiError> {
    let filters = Filters::new(request.filters, &["instance-type", "location"])?;
    let page = Page::new("DescribeInstanceTypeOfferings", request.max_results, request.next_token.as_deref(), 1000)?;
    let location_type = request.location_type.unwrap_or_else(|| "region".into());
    let mut locations: Vec<&str> = match location_type.as_str() {
        "region" => vec![&call.region.name],
        "availability-zone" => call.region.zones.iter().map(|zone| zone.name.as_str()).collect(),
        "availability-zone-id" => call.region.zones.iter().map(|zone| zone.id.as_str()).collect(),
        // The region has none.
        "outpost" => Vec::new(),
        other => return Err(ApiError::invalid_parameter("LocationType", other)),
    };
    locations.sort_unstable();
    let places = all().iter().flat_map(|kind| locations.iter().map(move |location| (kind, *location)));
    let passing = places.filter(|(kind, location)| {
        filters.is_empty()
            || filters.pass(&TagMap::new(), |name, test| match name {
                "instance-type" => test(kind.name),
                "location" => test(location),
                _ => false,
            })
    });
    // The blank sorts before every character of a name, so that keys have the order of the rows.
    let (instance_type_offerings, next_token) = page.take(passing.map(|(kind, location)| {
        let offering =
            InstanceTypeOffering { instance_type: word(kind.name), location_type: Some(location_type.clone()), location: word(location) };
        (format!("{} {location}", kind.name), offering)
    }));
    Ok(DescribeInstanceTypeOfferingsResult { instance_type_offerings, next_token })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, Fixture};

    fn describe(request: DescribeInstanceTypesRequest) -> Result<DescribeInstanceTypesResult, ApiError> {
        Fixture::new().call(ALICE, |call| describe_instance_types(call, request))
    }

    fn filter(name: &str, value: &str) -> crate::shapes::Filter {
        crate::shapes::Filter { name: Some(name.into()), values: vec![value.into()] }
    }

    #[test]
    fn every_line_of_the_file_is_a_type() {
        let lines = FACTS.lines().filter(|line| !line.starts_with('#')).count() - 1;
        assert_eq!(all().len(), lines);
        assert_eq!(lines, 1437);
        for kind in all() {
            assert_eq!(kind.cores * kind.threads_per_core, kind.vcpus, "{}", kind.name);
            assert!(kind.memory_mib > 0 && kind.max_interfaces > 0 && !kind.network_cards.is_empty(), "{}", kind.name);
            assert!(!usage_classes(kind).is_empty() && !kind.architectures.is_empty(), "{}", kind.name);
            assert!(std::ptr::eq(find(kind.name).unwrap(), kind));
        }
    }

    #[test]
    fn known_types_have_their_published_figures() {
        for (name, vcpus, memory_mib, interfaces, architecture) in [
            ("t3.micro", 2, 1024, 2, "x86_64"),
            ("t2.nano", 1, 512, 2, "x86_64"),
            ("m5.large", 2, 8192, 3, "x86_64"),
            ("c6g.xlarge", 4, 8192, 4, "arm64"),
            ("r5.24xlarge", 96, 786_432, 15, "x86_64"),
            ("m1.small", 1, 1740, 2, "x86_64"),
            ("u-24tb1.metal", 448, 25_165_824, 15, "x86_64"),
        ] {
            let kind = find(name).unwrap();
            let figures = (kind.vcpus, kind.memory_mib, kind.max_interfaces);
            assert_eq!(figures, (vcpus, memory_mib, interfaces), "{name}");
            assert!(check_architecture(kind, architecture).is_ok(), "{name}");
        }
        assert_eq!(check_architecture(find("m5.large").unwrap(), "arm64").unwrap_err().code, "InvalidParameterValue");
        assert!(find("m5.huge").is_none());
    }

    #[test]
    fn an_answer_holds_nested_figures() {
        let answer = describe(DescribeInstanceTypesRequest { instance_types: vec!["p4d.24xlarge".into()], ..Default::default() }).unwrap();
        let [kind] = answer.instance_types.as_slice() else { panic!() };
        assert_eq!(kind.v_cpu_info.as_ref().unwrap().valid_cores.len(), 24);
        assert_eq!(kind.network_info.as_ref().unwrap().network_cards.len(), 4);
        assert_eq!(kind.gpu_info.as_ref().unwrap().total_gpu_memory_in_mi_b, Some(327_680));
        assert_eq!(kind.instance_storage_info.as_ref().unwrap().total_size_in_gb, Some(8000));
        assert_eq!(kind.ebs_info.as_ref().unwrap().ebs_optimized_info.as_ref().unwrap().maximum_iops, Some(80_000));
    }

    #[test]
    fn pages_of_100_hold_the_whole_catalogue_in_order() {
        let fixture = Fixture::new();
        let (mut names, mut token) = (Vec::new(), None);
        loop {
            let request = DescribeInstanceTypesRequest { next_token: token, ..Default::default() };
            let answer = fixture.call(ALICE, |call| describe_instance_types(call, request)).unwrap();
            assert!(answer.instance_types.len() <= 100);
            names.extend(answer.instance_types.into_iter().filter_map(|kind| kind.instance_type));
            token = answer.next_token;
            if token.is_none() {
                break;
            }
        }
        assert_eq!(names, all().iter().map(|kind| kind.name).collect::<Vec<_>>());
    }

    #[test]
    fn filters_select_by_published_values() {
        let filters = vec![
            filter("current-generation", "true"),
            filter("vcpu-info.default-vcpus", "2"),
            filter("memory-info.size-in-mib", "1024"),
            filter("processor-info.supported-architecture", "x86_64"),
        ];
        let answer = describe(DescribeInstanceTypesRequest { filters, ..Default::default() }).unwrap();
        let names: Vec<_> = answer.instance_types.iter().filter_map(|kind| kind.instance_type.as_deref()).collect();
        assert_eq!(names, ["t3.micro", "t3a.micro", "t8i.micro"]);
        for name in NAMES {
            let answer = describe(DescribeInstanceTypesRequest { filters: vec![filter(name, "*")], ..Default::default() }).unwrap();
            assert!(!answer.instance_types.is_empty(), "no type has {name}");
        }
    }

    #[test]
    fn unknown_types_are_named_in_the_refusal() {
        let error = describe(DescribeInstanceTypesRequest { instance_types: vec!["m5.large".into(), "x.y".into()], ..Default::default() });
        let error = error.unwrap_err();
        assert_eq!(error.code, "InvalidInstanceType");
        assert!(error.message.ends_with("[x.y]"));
    }

    #[test]
    fn offerings_name_every_zone() {
        let request = DescribeInstanceTypeOfferingsRequest {
            location_type: Some("availability-zone-id".into()),
            filters: vec![filter("instance-type", "t3.micro")],
            ..Default::default()
        };
        let answer = Fixture::new().call(ALICE, |call| describe_instance_type_offerings(call, request)).unwrap();
        let locations: Vec<_> = answer.instance_type_offerings.iter().filter_map(|offering| offering.location.as_deref()).collect();
        assert_eq!(locations, ["use1-az1", "use1-az2", "use1-az3"]);
    }
}
