//! Request throttling as EC2's developer guide has it ("Request throttling for the Amazon EC2 API"): token buckets for each
//! account and action of this region.
//!
//! | bucket | a request takes | which requests |
//! |---|---|---|
//! | request | 1 | all but those of the next line |
//! | whole list | 1 | seven long listings, asked for without a filter and without a page |
//! | resource | 1 for each instance it names | Run-, Start-, Stop- and TerminateInstances, besides their request bucket |
//!
//! A request that any of its buckets is too empty for takes nothing from the other, and nothing of it is done. What it took
//! from a resource bucket comes back when the action fails, because then no instance was touched. RunInstances is charged
//! with its MaxCount. A listing by ids counts as a whole list, as the guide names only filters and pages.
//!
//! EC2 has more buckets for requests that its own console makes; no request here says that it is one.
//!
//! Invariant: buckets exist only where tokens are missing, up to the next sweep: a full bucket and none are the same. So an
//! idle account costs nothing once its buckets have filled again, at most 500 s and a sweep later.

use std::collections::HashMap;
use std::time::Duration;

use rate_limit::TokenBucket;

use crate::shape::Parameter;

/// Refills below one a second exist, so a bucket counts in thousandths.
const MILLI: u64 = 1_000;

/// How often buckets that are full again are dropped.
const SWEEP_EVERY: Duration = Duration::from_mins(1);

/// Accounts that may miss tokens at one time. Beyond, when a sweep does not help, all is forgotten: who behaves is not to
/// suffer from the number of others.
const MOST_ACCOUNTS: usize = 10_000;

/// What a request asks for, as far as it costs tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The name of the action, one of ours.
    pub action: &'static str,
    /// Neither a filter nor a page was asked for.
    pub unbounded: bool,
    /// Instances that the action will touch if it is one of those that do.
    pub instances: u64,
}

impl Ask {
    /// Reads a request of the Query protocol. Values that the action will refuse cost nothing here.
    #[must_use]
    pub fn query(action: &'static str, parameters: &[Parameter<'_>]) -> Self {
        let narrows = |name: &str| name.starts_with("Filter.") || matches!(name, "MaxResults" | "NextToken");
        let instances = if action == "RunInstances" {
            let count = parameters.iter().find(|parameter| parameter.name == "MaxCount");
            count.and_then(|parameter| parameter.value.parse().ok()).unwrap_or(0)
        } else {
            parameters.iter().filter(|parameter| parameter.name.starts_with("InstanceId.")).count() as u64
        };
        Self { action, unbounded: !parameters.iter().any(|parameter| narrows(parameter.name)), instances }
    }

    fn costs(self) -> impl Iterator<Item = Cost> {
        let listing = whole_list(self.action).filter(|_| self.unbounded);
        let request = match listing {
            Some(limit) => Cost { bucket: Bucket::WholeList, limit, tokens: MILLI },
            None => Cost { bucket: Bucket::Request, limit: request(self.action), tokens: MILLI },
        };
        [Some(request), self.resource_cost()].into_iter().flatten()
    }

    fn resource_cost(self) -> Option<Cost> {
        let tokens = self.instances.saturating_mul(MILLI);
        resource(self.action).map(|limit| Cost { bucket: Bucket::Resource, limit, tokens })
    }
}

/// The kinds of buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bucket {
    /// Counts requests.
    Request,
    /// Counts unfiltered and unpaginated listings.
    WholeList,
    /// Counts instances.
    Resource,
}

impl Bucket {
    /// Its name among the metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::WholeList => "whole_list",
            Self::Resource => "resource",
        }
    }
}

/// The buckets of all accounts. `now` counts from any fixed moment, the same for all calls.
#[derive(Debug, Default)]
pub struct Throttle {
    accounts: HashMap<String, Account>,
    swept: Duration,
}

/// By action and kind.
type Account = HashMap<(&'static str, Bucket), Level>;

impl Throttle {
    /// Takes the tokens of a request, or none.
    ///
    /// # Errors
    /// The bucket that is too empty.
    pub fn admit(&mut self, now: Duration, account_id: &str, ask: Ask) -> Result<(), Bucket> {
        self.sweep(now);
        let account = self.accounts.entry(account_id.to_owned()).or_default();
        for cost in ask.costs() {
            let level = account.entry((ask.action, cost.bucket)).or_insert_with(|| Level::full(cost.limit, now));
            if level.tokens.available(now) < cost.tokens {
                return Err(cost.bucket);
            }
        }
        for cost in ask.costs() {
            if let Some(level) = account.get_mut(&(ask.action, cost.bucket)) {
                // The first pass saw that they are there.
                let _ = level.tokens.take(now, cost.tokens);
            }
        }
        Ok(())
    }

    /// Returns the resource tokens of an admitted request that touched no instance.
    pub fn give_back(&mut self, now: Duration, account_id: &str, ask: Ask) {
        let Some(cost) = ask.resource_cost() else { return };
        let level = self.accounts.get_mut(account_id).and_then(|account| account.get_mut(&(ask.action, cost.bucket)));
        // A bucket that a sweep has dropped meanwhile was full.
        if let Some(level) = level {
            level.give_back(now, cost.tokens);
        }
    }

    /// Drops the buckets that are full again, now and then.
    fn sweep(&mut self, now: Duration) {
        let crowded = MOST_ACCOUNTS <= self.accounts.len();
        if !crowded && now < self.swept.saturating_add(SWEEP_EVERY) {
            return;
        }
        self.swept = now;
        self.accounts.retain(|_, account| {
            account.retain(|_, level| !level.is_full(now));
            !account.is_empty()
        });
        // Above half, the next sweep would come too soon to be worth its time.
        if crowded && MOST_ACCOUNTS / 2 < self.accounts.len() {
            tracing::warn!(accounts = self.accounts.len(), "too many accounts are throttled, all start anew");
            self.accounts.clear();
        }
    }
}

/// A bucket with what it holds at most.
#[derive(Debug)]
struct Level {
    limit: Limit,
    tokens: TokenBucket,
}

impl Level {
    fn full(limit: Limit, now: Duration) -> Self {
        Self { limit, tokens: TokenBucket::new(limit.refill_milli_per_s, limit.capacity_milli(), now) }
    }

    fn is_full(&mut self, now: Duration) -> bool {
        self.tokens.available(now) == self.limit.capacity_milli()
    }

    fn give_back(&mut self, now: Duration, tokens: u64) {
        let missing = self.limit.capacity_milli().saturating_sub(self.tokens.available(now));
        let mut tokens_after = Self::full(self.limit, now).tokens;
        // Never more than the full bucket holds.
        let _ = tokens_after.take(now, missing.saturating_sub(tokens));
        self.tokens = tokens_after;
    }
}

/// What a request takes from one bucket, in thousandths.
#[derive(Debug, Clone, Copy)]
struct Cost {
    bucket: Bucket,
    limit: Limit,
    tokens: u64,
}

/// Size and refill of a bucket.
#[derive(Debug, Clone, Copy)]
struct Limit {
    capacity: u64,
    refill_milli_per_s: u64,
}

impl Limit {
    const fn per_s(capacity: u64, refill_per_s: u64) -> Self {
        Self { capacity, refill_milli_per_s: refill_per_s * MILLI }
    }

    const fn milli_per_s(capacity: u64, refill_milli_per_s: u64) -> Self {
        Self { capacity, refill_milli_per_s }
    }

    const fn capacity_milli(self) -> u64 {
        self.capacity * MILLI
    }
}

/// The guide's table of request buckets: the actions with numbers of their own, then the two categories. Its resource-intensive
/// actions have the numbers of other mutating ones, and every action has its own bucket anyway.
fn request(action: &str) -> Limit {
    match action {
        "RunInstances" | "StartInstances" => Limit::per_s(5, 2),
        "CreateTags" | "DeleteTags" => Limit::per_s(100, 10),
        "TerminateInstances"
        | "AssignIpv6Addresses"
        | "AssignPrivateIpAddresses"
        | "UnassignPrivateIpAddresses"
        | "AssociateIamInstanceProfile"
        | "DisassociateIamInstanceProfile"
        | "CreateLaunchTemplateVersion"
        | "ModifyLaunchTemplate"
        | "CreateNetworkInterface"
        | "DeleteNetworkInterface"
        | "ModifyNetworkInterfaceAttribute"
        | "CreateSnapshot"
        | "CreateSnapshots"
        | "DeleteSnapshot"
        | "ModifySnapshotAttribute"
        | "CreateVolume"
        | "DeleteVolume"
        | "DeregisterImage"
        | "ModifyImageAttribute"
        | "ModifyInstanceMetadataOptions" => Limit::per_s(100, 5),
        "CopyImage" => Limit::per_s(100, 1),
        "CreateNatGateway"
        | "DeleteNatGateway"
        | "AssociateNatGatewayAddress"
        | "DisassociateNatGatewayAddress"
        | "AssignPrivateNatGatewayAddress"
        | "UnassignPrivateNatGatewayAddress"
        | "CreateVpcEndpointServiceConfiguration"
        | "DeleteVpcEndpointServiceConfigurations"
        | "ModifyVpcEndpointServiceConfiguration"
        | "AcceptVpcEndpointConnections"
        | "RejectVpcEndpointConnections" => Limit::per_s(10, 1),
        "CreateVpcEndpoint" | "DeleteVpcEndpoints" | "ModifyVpcEndpoint" => Limit::milli_per_s(4, 300),
        "CreateDefaultVpc" | "CreateDefaultSubnet" | "DescribeInstanceTopology" | "MoveAddressToVpc" => Limit::per_s(1, 1),
        "CreateSubnetCidrReservation" | "DeleteSubnetCidrReservation" => Limit::per_s(5, 1),
        "ModifyInstanceMetadataDefaults" => Limit::per_s(2, 2),
        "DescribeSecurityGroupReferences" | "DescribeStaleSecurityGroups" => Limit::per_s(20, 5),
        "CreateRestoreImageTask" | "CreateStoreImageTask" => Limit::milli_per_s(50, 100),
        "DescribeStoreImageTasks" => Limit::milli_per_s(50, 500),
        "EnableImageBlockPublicAccess"
        | "DisableImageBlockPublicAccess"
        | "EnableSnapshotBlockPublicAccess"
        | "DisableSnapshotBlockPublicAccess" => Limit::milli_per_s(1, 100),
        _ if ["Describe", "List", "Search", "Get"].iter().any(|verb| action.starts_with(verb)) => Limit::per_s(100, 20),
        _ => Limit::per_s(50, 5),
    }
}

fn whole_list(action: &str) -> Option<Limit> {
    let listed = matches!(
        action,
        "DescribeInstances"
            | "DescribeInstanceStatus"
            | "DescribeNetworkInterfaces"
            | "DescribeSecurityGroups"
            | "DescribeSnapshots"
            | "DescribeSpotInstanceRequests"
            | "DescribeVolumes"
    );
    listed.then_some(Limit::per_s(50, 10))
}

fn resource(action: &str) -> Option<Limit> {
    match action {
        "RunInstances" | "StartInstances" => Some(Limit::per_s(1_000, 2)),
        "StopInstances" | "TerminateInstances" => Some(Limit::per_s(1_000, 20)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn ask(action: &'static str, parameters: &[(&str, &str)]) -> Ask {
        let parameters: Vec<_> = parameters.iter().map(|(name, value)| Parameter { name, value }).collect();
        Ask::query(action, &parameters)
    }

    /// Admits until a bucket refuses.
    fn drain(throttle: &mut Throttle, now: Duration, account_id: &str, ask: Ask) -> (usize, Bucket) {
        let mut admitted = 0;
        loop {
            match throttle.admit(now, account_id, ask) {
                Ok(()) => admitted += 1,
                Err(bucket) => return (admitted, bucket),
            }
            assert!(admitted < 10_000, "{ask:?} is never refused");
        }
    }

    #[test]
    fn an_action_gives_its_burst_and_then_its_refill() {
        for (action, burst, in_ten_s) in [
            ("DescribeVpcs", 100, 100),
            ("GetConsoleOutput", 100, 100),
            ("CreateVpc", 50, 50),
            ("AuthorizeSecurityGroupIngress", 50, 50),
            ("RunInstances", 5, 5),
            ("StartInstances", 5, 5),
            ("TerminateInstances", 100, 50),
            ("CreateTags", 100, 100),
            ("CreateVolume", 100, 50),
            ("CreateNatGateway", 10, 10),
            ("CreateVpcEndpoint", 4, 3),
            ("EnableImageBlockPublicAccess", 1, 1),
        ] {
            let mut throttle = Throttle::default();
            let ask = ask(action, &[]);
            assert_eq!(drain(&mut throttle, S, "1", ask), (burst, Bucket::Request), "{action}");
            assert_eq!(drain(&mut throttle, 11 * S, "1", ask).0, in_ten_s, "{action}");
        }
    }

    #[test]
    fn a_fractional_refill_comes_when_it_is_whole() {
        let mut throttle = Throttle::default();
        let ask = ask("EnableImageBlockPublicAccess", &[]);
        assert_eq!(throttle.admit(S, "1", ask), Ok(()));
        assert_eq!(throttle.admit(11 * S - Duration::from_millis(1), "1", ask), Err(Bucket::Request));
        assert_eq!(throttle.admit(11 * S, "1", ask), Ok(()));
    }

    #[test]
    fn a_whole_list_has_a_smaller_bucket_than_a_filtered_or_paged_one() {
        let mut throttle = Throttle::default();
        assert_eq!(drain(&mut throttle, S, "1", ask("DescribeInstances", &[])), (50, Bucket::WholeList));
        let filtered = ask("DescribeInstances", &[("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", "vpc-1")]);
        assert_eq!(throttle.admit(S, "1", filtered), Ok(()));
        assert_eq!(drain(&mut throttle, S, "1", ask("DescribeInstances", &[("MaxResults", "5")])), (99, Bucket::Request));
        assert_eq!(drain(&mut throttle, 2 * S, "1", ask("DescribeInstances", &[])), (10, Bucket::WholeList));
        assert_eq!(drain(&mut throttle, S, "1", ask("DescribeSubnets", &[])), (100, Bucket::Request));
    }

    #[test]
    fn accounts_and_actions_do_not_share_buckets() {
        let mut throttle = Throttle::default();
        drain(&mut throttle, S, "1", ask("CreateVpc", &[]));
        assert_eq!(throttle.admit(S, "1", ask("CreateSubnet", &[])), Ok(()));
        assert_eq!(throttle.admit(S, "2", ask("CreateVpc", &[])), Ok(()));
    }

    #[test]
    fn instances_are_counted_besides_requests() {
        let mut throttle = Throttle::default();
        let run = |count: &str| ask("RunInstances", &[("MinCount", "1"), ("MaxCount", count)]);
        assert_eq!(throttle.admit(S, "1", run("998")), Ok(()));
        assert_eq!(throttle.admit(S, "1", run("3")), Err(Bucket::Resource));
        assert_eq!(throttle.admit(S, "1", run("2")), Ok(()));
        assert_eq!(throttle.admit(2 * S, "1", run("3")), Err(Bucket::Resource));
        assert_eq!(throttle.admit(2 * S, "1", run("2")), Ok(()));
        assert_eq!(throttle.admit(2 * S, "2", run("1001")), Err(Bucket::Resource));
        assert_eq!(throttle.admit(2 * S, "2", run("18446744073709551615")), Err(Bucket::Resource));
        assert_eq!(throttle.admit(2 * S, "2", run("-1")), Ok(()), "RunInstances itself refuses it");
        assert_eq!(ask("StopInstances", &[("InstanceId.1", "i-1"), ("InstanceId.2", "i-2"), ("Force", "true")]).instances, 2);
    }

    #[test]
    fn who_is_refused_by_one_bucket_takes_nothing_from_the_other() {
        let mut throttle = Throttle::default();
        let run = |instances| Ask { action: "RunInstances", unbounded: true, instances };
        for _ in 0..10 {
            assert_eq!(throttle.admit(S, "1", run(1_001)), Err(Bucket::Resource));
        }
        assert_eq!(drain(&mut throttle, S, "1", run(1)), (5, Bucket::Request));
        for _ in 0..10 {
            assert_eq!(throttle.admit(S, "1", run(100)), Err(Bucket::Request));
        }
        assert_eq!(throttle.admit(2 * S, "1", run(997)), Ok(()));
    }

    #[test]
    fn a_failed_action_gets_its_instances_back_and_not_its_request() {
        let mut throttle = Throttle::default();
        let run = Ask { action: "RunInstances", unbounded: true, instances: 900 };
        for _ in 0..5 {
            assert_eq!(throttle.admit(S, "1", run), Ok(()));
            throttle.give_back(S, "1", run);
        }
        assert_eq!(throttle.admit(S, "1", run), Err(Bucket::Request));
        for now in [2 * S, 3 * S] {
            throttle.give_back(now, "1", run);
            throttle.give_back(now, "2", run);
        }
        assert_eq!(throttle.admit(3 * S, "1", Ask { instances: 1_001, ..run }), Err(Bucket::Resource), "never more than it holds");
        assert_eq!(throttle.admit(3 * S, "1", Ask { instances: 1_000, ..run }), Ok(()));
    }

    #[test]
    fn full_buckets_of_idle_accounts_are_dropped() {
        let mut throttle = Throttle::default();
        for account in 0..100 {
            assert_eq!(throttle.admit(S, &account.to_string(), ask("DescribeVpcs", &[])), Ok(()));
        }
        let run = Ask { action: "RunInstances", unbounded: true, instances: 1_000 };
        assert_eq!(throttle.admit(S, "busy", run), Ok(()));
        assert_eq!(throttle.admit(200 * S, "other", ask("DescribeVpcs", &[])), Ok(()));
        assert_eq!(throttle.accounts.len(), 2);
        assert_eq!(throttle.accounts["busy"].len(), 1, "only what is not full");
        assert_eq!(throttle.admit(200 * S, "busy", run), Err(Bucket::Resource));
        assert_eq!(throttle.admit(700 * S, "other", ask("DescribeVpcs", &[])), Ok(()));
        assert!(!throttle.accounts.contains_key("busy"));
    }

    #[test]
    fn the_number_of_accounts_is_bounded() {
        let mut throttle = Throttle::default();
        for account in 0..3 * MOST_ACCOUNTS {
            assert_eq!(throttle.admit(S, &account.to_string(), ask("CreateVpc", &[])), Ok(()));
            assert!(throttle.accounts.len() <= MOST_ACCOUNTS);
        }
    }
}
