//! The tenant API. The launch path of a request starts here:
//!
//! ```text
//! server ─▶ api (or rest) ─▶ auth: the signature makes a Principal
//!                        ─▶ throttle: the account has not asked too often
//!                        ─▶ query, shape: parameters become a typed request
//!                        ─▶ resource/*: one action in one transaction of the world
//!                        ─▶ the commit is durable ─▶ xml (or JSON) ─▶ answer
//! ```
//!
//! EC2 and STS share one endpoint and are told apart by the service that the signature names and by `Version`. The table of
//! actions stands at the end of this file; what is not in it answers `InvalidAction`.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{any, get};
use bytes::Bytes;

use crate::auth::{Principal, Service, Verifier};
use crate::cards::Cards;
use crate::error::ApiError;
use crate::later;
use crate::metrics::Metrics;
use crate::model::{Card, Time};
use crate::query::Form;
use crate::resource;
use crate::rest;
use crate::server;
use crate::shape::{Answer, Decode, Node, Request as Input};
use crate::throttle::{Ask, Throttle};
use crate::world::{Call, Sequence, StoreGone, World};
use crate::xml::Xml;

const EC2_VERSION: &str = "2016-11-15";
const EC2_NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";
const STS_VERSION: &str = "2011-06-15";
const STS_NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

/// What every request needs.
pub struct Api {
    /// The rows.
    pub world: Arc<World>,
    /// The connections to the cards; none in a process without cards.
    pub cards: Option<Arc<Cards>>,
    verifier: Verifier,
    metrics: Metrics,
    /// None: every request is served.
    throttle: Option<Mutex<Throttle>>,
    /// The moment that the throttle counts from.
    started: Instant,
}

impl Api {
    /// An API over a world, that refuses what the throttle refuses.
    #[must_use]
    pub fn new(world: Arc<World>, cards: Option<Arc<Cards>>, throttle: Option<Throttle>) -> Arc<Self> {
        let (verifier, metrics) = (Verifier::default(), Metrics::default());
        Arc::new(Self { world, cards, verifier, metrics, throttle: throttle.map(Mutex::new), started: Instant::now() })
    }

    /// Everything that the tenants' listener serves.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/", any(query))
            .route("/api/v1/{*path}", any(rest::handle))
            .route("/healthz", get(healthz))
            .route("/metrics", get(metrics))
            .fallback(not_found)
            .with_state(self.clone())
    }

    /// Verifies the signature of a request whose body was read.
    pub(crate) fn verify(&self, parts: &Parts, body: &Bytes) -> Result<(Principal, Service), ApiError> {
        let headers: Vec<(&str, &[u8])> = parts.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let request = sigv4::Request {
            method: parts.method.as_str(),
            path: parts.uri.path(),
            query: parts.uri.query().unwrap_or_default(),
            headers: &headers,
            body,
        };
        self.verifier.verify(&self.world, request, Time::now())
    }

    /// Asks the throttle; nothing of a refused request is done.
    pub(crate) fn admit(&self, principal: &Principal, ask: Ask) -> Result<(), ApiError> {
        let Some(throttle) = &self.throttle else { return Ok(()) };
        let mut throttle = throttle.lock().unwrap_or_else(PoisonError::into_inner);
        throttle.admit(self.started.elapsed(), principal.account_id(), ask).map_err(|bucket| {
            self.metrics.throttled(ask.action, bucket.word());
            ApiError::request_limit_exceeded()
        })
    }

    /// Tells the throttle that an admitted request changed nothing.
    pub(crate) fn give_back(&self, principal: &Principal, ask: Ask) {
        if let Some(throttle) = &self.throttle {
            let mut throttle = throttle.lock().unwrap_or_else(PoisonError::into_inner);
            throttle.give_back(self.started.elapsed(), principal.account_id(), ask);
        }
    }

    /// Runs one action in one transaction, which is undone when the action fails or was only tried.
    pub(crate) fn act<T>(
        &self,
        principal: &Principal,
        dry_run: bool,
        action: impl FnOnce(&mut Call<'_>) -> Result<T, ApiError>,
    ) -> (Result<T, ApiError>, Sequence) {
        self.world.call(principal, Time::now(), |call| match action(call) {
            Ok(_) if dry_run => Err(ApiError::dry_run()),
            result => result,
        })
    }

    /// Waits until all that an answer was made from survives a crash.
    pub(crate) async fn durable(&self, sequence: Sequence) -> Result<(), ApiError> {
        self.world.durable(sequence).await.map_err(|StoreGone| {
            tracing::error!("the store takes no more writes");
            ApiError::unavailable("The service cannot store changes at present")
        })
    }

    /// Counts and logs an answer.
    pub(crate) fn answered(&self, action: &'static str, id: &RequestId, status: u16, error: Option<&ApiError>, since: Instant) {
        let time = since.elapsed();
        self.metrics.request(action, status, time);
        match error {
            // A throttled client is the client's affair, and there may be a flood of them.
            Some(error) if error.status < 500 || error.code == "RequestLimitExceeded" => {
                tracing::debug!(action, request = id.as_str(), %error, "refused")
            }
            Some(error) if error.status == 500 && error.code == "InternalError" => {
                tracing::error!(action, request = id.as_str(), %error, "failed");
            }
            Some(error) => tracing::warn!(action, request = id.as_str(), %error, "not possible at present"),
            None => tracing::debug!(action, request = id.as_str(), us = time.as_micros(), "answered"),
        }
    }
}

/// Names one request in the answer and in the log: a random UUID.
#[derive(Debug)]
pub(crate) struct RequestId(String);

impl RequestId {
    pub(crate) fn new() -> Self {
        let mut bytes = random();
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
        *version = *version & 0x0f | 0x40;
        *variant = *variant & 0x3f | 0x80;
        let mut text = hex::encode(bytes);
        for place in [20, 16, 12, 8] {
            text.insert(place, '-');
        }
        Self(text)
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Random bytes for an id. The system is asked once for many of them, as each time costs as much as all else about an id.
fn random() -> [u8; 16] {
    const IDS: usize = 64;
    thread_local! {
        static LEFT: RefCell<Vec<[u8; 16]>> = const { RefCell::new(Vec::new()) };
    }
    LEFT.with_borrow_mut(|left| {
        if left.is_empty() {
            let mut bytes = [0; 16 * IDS];
            if getrandom::fill(&mut bytes).is_err() {
                // The id only serves to find a request again; a fixed one does less of that and no harm.
                bytes = [0; 16 * IDS];
            }
            left.extend(bytes.as_chunks().0);
        }
        left.pop().unwrap_or_default()
    })
}

pub(crate) fn response(status: u16, content_type: &'static str, id: &RequestId, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Ok(id) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert("x-amzn-requestid", id);
    }
    response
}

async fn query(State(api): State<Arc<Api>>, request: Request) -> Response {
    let (id, since) = (RequestId::new(), Instant::now());
    let (parts, body) = request.into_parts();
    let mut reply = Reply { service: Service::Ec2, action: "none" };
    let result = reply.run(&api, &id, &parts, body).await;
    let status = result.as_ref().map_or_else(|error| error.status, |_| 200);
    api.answered(reply.action, &id, status, result.as_ref().err(), since);
    let text = result.unwrap_or_else(|error| error_text(reply.service, &id, &error));
    response(status, "text/xml;charset=UTF-8", &id, text)
}

/// What is known of a request of the Query protocol while it is read.
struct Reply {
    /// In whose words errors are told.
    service: Service,
    action: &'static str,
}

impl Reply {
    async fn run(&mut self, api: &Api, id: &RequestId, parts: &Parts, body: Body) -> Result<String, ApiError> {
        let body = server::read_body(&parts.headers, body).await?;
        let form = Form::parse(parts.uri.query().unwrap_or_default(), &body);
        let version = form.as_ref().ok().and_then(|form| form.single("Version").ok().flatten());
        if version == Some(STS_VERSION) {
            self.service = Service::Sts;
        }
        let (principal, signed) = api.verify(parts, &body)?;
        let form = form?;
        if form.single("Version")?.is_some() && signed != self.service {
            let right = if self.service == Service::Sts { "sts" } else { "ec2" };
            let message = format!("Credential should be scoped to correct service: '{right}'.");
            return Err(ApiError::with_status(403, "SignatureDoesNotMatch", message));
        }
        let action = form.single("Action")?.filter(|action| !action.is_empty());
        let action = action.ok_or_else(|| ApiError::new("MissingAction", "The request must contain the parameter Action"))?;
        match form.single("Version")? {
            Some(EC2_VERSION) => {}
            Some(STS_VERSION) => return self.security_token(action, id, &principal, &form),
            Some(other) => {
                let message = format!("The requested version ({other}) of service AmazonEC2 does not exist");
                return Err(ApiError::new("NoSuchVersion", message));
            }
            None => return Err(ApiError::missing_parameter("Version")),
        }
        let (name, handler) = handler(action).ok_or_else(|| ApiError::invalid_action(action))?;
        self.action = name;
        let mut parameters = form.parameters();
        let ask = Ask::query(name, &parameters);
        api.admit(&principal, ask)?;
        let mut xml = Xml::with_capacity(8 * 1024);
        xml.declaration();
        xml.open_response(name, EC2_NAMESPACE);
        xml.element("requestId", id.as_str());
        let node = Node::root(&mut parameters);
        match handler {
            Handler::Now(handler) => {
                let (result, sequence) = handler(api, &principal, node, &mut xml);
                if result.is_err() {
                    api.give_back(&principal, ask);
                }
                // A refusal tells of the state as much as an answer does.
                api.durable(sequence).await?;
                result?;
            }
            Handler::Later(handler) => handler(api, &principal, node)?.await?.members(&mut xml),
        }
        xml.close_response(name);
        Ok(xml.into_string())
    }

    /// STS: only who am I.
    fn security_token(&mut self, action: &str, id: &RequestId, principal: &Principal, form: &Form<'_>) -> Result<String, ApiError> {
        if action != "GetCallerIdentity" {
            let message = format!("Could not find operation {action} for version {STS_VERSION}");
            return Err(ApiError::new("InvalidAction", message));
        }
        self.action = "GetCallerIdentity";
        if let Some(parameter) = form.parameters().first() {
            return Err(ApiError::unknown_parameter(parameter.name));
        }
        let mut xml = Xml::with_capacity(512);
        xml.open_response(self.action, STS_NAMESPACE);
        xml.open("GetCallerIdentityResult");
        xml.element("Arn", &principal.arn());
        xml.element("UserId", principal.account_id());
        xml.element("Account", principal.account_id());
        xml.close("GetCallerIdentityResult");
        xml.open("ResponseMetadata");
        xml.element("RequestId", id.as_str());
        xml.close("ResponseMetadata");
        xml.close_response(self.action);
        Ok(xml.into_string())
    }
}

fn error_text(service: Service, id: &RequestId, error: &ApiError) -> String {
    let mut xml = Xml::with_capacity(512);
    xml.declaration();
    if service == Service::Sts {
        xml.open_namespace("ErrorResponse", STS_NAMESPACE);
        xml.open("Error");
        xml.element("Type", if error.status < 500 { "Sender" } else { "Receiver" });
    } else {
        xml.open("Response");
        xml.open("Errors");
        xml.open("Error");
    }
    xml.element("Code", &error.code);
    xml.element("Message", &error.message);
    xml.close("Error");
    if service == Service::Sts {
        xml.element("RequestId", id.as_str());
        xml.close("ErrorResponse");
    } else {
        xml.close("Errors");
        xml.element("RequestID", id.as_str());
        xml.close("Response");
    }
    xml.into_string()
}

async fn not_found(request: Request) -> Response {
    let (id, path) = (RequestId::new(), request.uri().path());
    let error = ApiError::with_status(404, "InvalidRequest", format!("There is nothing at {path}"));
    response(404, "text/xml;charset=UTF-8", &id, error_text(Service::Ec2, &id, &error))
}

/// Says whether answers can leave (they wait for the store), and how many cards instances can be placed on or volumes served from.
pub(crate) async fn healthz(State(api): State<Arc<Api>>) -> (StatusCode, String) {
    let ready = |card: &&Arc<Card>| card.watched && (card.host_connected || !card.compute);
    let (cards, sequence) = api.world.read(|tx| tx.all::<Card>().filter(ready).count());
    match tokio::time::timeout(Duration::from_secs(1), api.world.durable(sequence)).await {
        Ok(Ok(())) => (StatusCode::OK, format!("{{\"status\":\"ok\",\"cards_ready\":{cards}}}\n")),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "{\"status\":\"the store does not answer\"}\n".to_owned()),
    }
}

pub(crate) async fn metrics(State(api): State<Arc<Api>>) -> String {
    api.metrics.to_text()
}

/// How an action is run.
enum Handler {
    /// In one transaction: decodes, acts, appends the members of the answer.
    Now(fn(&Api, &Principal, Node<'_>, &mut Xml) -> Outcome),
    /// In part outside of transactions, because it takes its time.
    Later(for<'a> fn(&'a Api, &'a Principal, Node<'_>) -> Result<Pending<'a>, ApiError>),
}

/// What became of it, and the commit that it saw.
type Outcome = (Result<(), ApiError>, Sequence);
type Pending<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Answer + Send>, ApiError>> + Send + 'a>>;

fn perform<Q: Input, A: Answer>(
    action: fn(&mut Call<'_>, Q) -> Result<A, ApiError>,
    api: &Api,
    principal: &Principal,
    node: Node<'_>,
    xml: &mut Xml,
) -> Outcome {
    let request = match Q::decode(node) {
        Ok(request) => request,
        Err(error) => return (Err(error), Sequence::default()),
    };
    let (result, sequence) = api.act(principal, request.dry_run(), |call| action(call, request));
    (result.map(|answer| answer.members(xml)), sequence)
}

macro_rules! actions {
    (now { $($name:ident => $module:ident::$function:ident,)* } later { $($later:ident => $later_module:ident::$later_function:ident,)* }) => {
        /// The action of a name.
        fn handler(name: &str) -> Option<(&'static str, Handler)> {
            match name {
                $(stringify!($name) => Some((stringify!($name), Handler::Now(|api, principal, node, xml| {
                    perform(resource::$module::$function, api, principal, node, xml)
                }))),)*
                $(stringify!($later) => Some((stringify!($later), Handler::Later(|api, principal, node| {
                    let request = Decode::decode(node)?;
                    Ok(Box::pin(async move {
                        let answer = $later_module::$later_function(api, principal, request).await?;
                        Ok(Box::new(answer) as Box<dyn Answer + Send>)
                    }))
                }))),)*
                _ => None,
            }
        }
    };
}

actions! {
    now {
        DescribeRegions => region::describe_regions,
        DescribeAvailabilityZones => region::describe_availability_zones,
        DescribeInstanceTypes => instance_type::describe_instance_types,
        DescribeInstanceTypeOfferings => instance_type::describe_instance_type_offerings,
        DescribeImages => image::describe_images,
        ImportKeyPair => key_pair::import_key_pair,
        DescribeKeyPairs => key_pair::describe_key_pairs,
        DeleteKeyPair => key_pair::delete_key_pair,
        CreateVpc => vpc::create_vpc,
        DescribeVpcs => vpc::describe_vpcs,
        DeleteVpc => vpc::delete_vpc,
        ModifyVpcAttribute => vpc::modify_vpc_attribute,
        DescribeVpcAttribute => vpc::describe_vpc_attribute,
        CreateSubnet => subnet::create_subnet,
        DescribeSubnets => subnet::describe_subnets,
        DeleteSubnet => subnet::delete_subnet,
        ModifySubnetAttribute => subnet::modify_subnet_attribute,
        CreateInternetGateway => internet_gateway::create_internet_gateway,
        AttachInternetGateway => internet_gateway::attach_internet_gateway,
        DetachInternetGateway => internet_gateway::detach_internet_gateway,
        DescribeInternetGateways => internet_gateway::describe_internet_gateways,
        DeleteInternetGateway => internet_gateway::delete_internet_gateway,
        CreateRouteTable => route_table::create_route_table,
        DescribeRouteTables => route_table::describe_route_tables,
        DeleteRouteTable => route_table::delete_route_table,
        AssociateRouteTable => route_table::associate_route_table,
        DisassociateRouteTable => route_table::disassociate_route_table,
        ReplaceRouteTableAssociation => route_table::replace_route_table_association,
        CreateRoute => route_table::create_route,
        ReplaceRoute => route_table::replace_route,
        DeleteRoute => route_table::delete_route,
        CreateSecurityGroup => security_group::create_security_group,
        DescribeSecurityGroups => security_group::describe_security_groups,
        DeleteSecurityGroup => security_group::delete_security_group,
        AuthorizeSecurityGroupIngress => security_group_rule::authorize_security_group_ingress,
        AuthorizeSecurityGroupEgress => security_group_rule::authorize_security_group_egress,
        RevokeSecurityGroupIngress => security_group_rule::revoke_security_group_ingress,
        RevokeSecurityGroupEgress => security_group_rule::revoke_security_group_egress,
        DescribeSecurityGroupRules => security_group_rule::describe_security_group_rules,
        DescribeNetworkAcls => network_acl::describe_network_acls,
        DescribeNetworkInterfaces => network_interface::describe_network_interfaces,
        AllocateAddress => address::allocate_address,
        AssociateAddress => address::associate_address,
        DisassociateAddress => address::disassociate_address,
        ReleaseAddress => address::release_address,
        DescribeAddresses => address::describe_addresses,
        RunInstances => instance::run_instances,
        DescribeInstances => instance::describe_instances,
        DescribeInstanceStatus => instance::describe_instance_status,
        StartInstances => instance::start_instances,
        StopInstances => instance::stop_instances,
        RebootInstances => instance::reboot_instances,
        TerminateInstances => instance::terminate_instances,
        ModifyInstanceAttribute => instance::modify_instance_attribute,
        DescribeInstanceAttribute => instance::describe_instance_attribute,
        ModifyInstanceMetadataOptions => instance::modify_instance_metadata_options,
        CreateTags => tag::create_tags,
        DeleteTags => tag::delete_tags,
        DescribeTags => tag::describe_tags,
        CreateVolume => volume::create_volume,
        DescribeVolumes => volume::describe_volumes,
        AttachVolume => volume::attach_volume,
        DetachVolume => volume::detach_volume,
        DeleteVolume => volume::delete_volume,
        DescribeAccountAttributes => region::describe_account_attributes,
        DescribeDhcpOptions => dhcp_options::describe_dhcp_options,
        CreateNetworkInterface => network_interface::create_network_interface,
        DeleteNetworkInterface => network_interface::delete_network_interface,
        AttachNetworkInterface => network_interface::attach_network_interface,
        DetachNetworkInterface => network_interface::detach_network_interface,
        ModifyNetworkInterfaceAttribute => network_interface::modify_network_interface_attribute,
        DescribeNetworkInterfaceAttribute => network_interface::describe_network_interface_attribute,
        ResetNetworkInterfaceAttribute => network_interface::reset_network_interface_attribute,
        AssignPrivateIpAddresses => network_interface::assign_private_ip_addresses,
        UnassignPrivateIpAddresses => network_interface::unassign_private_ip_addresses,
        ModifySecurityGroupRules => security_group_rule::modify_security_group_rules,
        UpdateSecurityGroupRuleDescriptionsIngress => security_group_rule::update_security_group_rule_descriptions_ingress,
        UpdateSecurityGroupRuleDescriptionsEgress => security_group_rule::update_security_group_rule_descriptions_egress,
        CreateManagedPrefixList => prefix_list::create_managed_prefix_list,
        ModifyManagedPrefixList => prefix_list::modify_managed_prefix_list,
        RestoreManagedPrefixListVersion => prefix_list::restore_managed_prefix_list_version,
        DeleteManagedPrefixList => prefix_list::delete_managed_prefix_list,
        DescribeManagedPrefixLists => prefix_list::describe_managed_prefix_lists,
        GetManagedPrefixListEntries => prefix_list::get_managed_prefix_list_entries,
        GetManagedPrefixListAssociations => prefix_list::get_managed_prefix_list_associations,
        DescribePrefixLists => prefix_list::describe_prefix_lists,
        CreateDhcpOptions => dhcp_options::create_dhcp_options,
        DeleteDhcpOptions => dhcp_options::delete_dhcp_options,
        AssociateDhcpOptions => dhcp_options::associate_dhcp_options,
        CreateNetworkAcl => network_acl::create_network_acl,
        DeleteNetworkAcl => network_acl::delete_network_acl,
        ReplaceNetworkAclAssociation => network_acl::replace_network_acl_association,
        CreateNetworkAclEntry => network_acl_entry::create_network_acl_entry,
        ReplaceNetworkAclEntry => network_acl_entry::replace_network_acl_entry,
        DeleteNetworkAclEntry => network_acl_entry::delete_network_acl_entry,
        CreateNatGateway => nat_gateway::create_nat_gateway,
        DescribeNatGateways => nat_gateway::describe_nat_gateways,
        DeleteNatGateway => nat_gateway::delete_nat_gateway,
        AssociateNatGatewayAddress => nat_gateway::associate_nat_gateway_address,
        DisassociateNatGatewayAddress => nat_gateway::disassociate_nat_gateway_address,
        CreateVpcPeeringConnection => vpc_peering_connection::create_vpc_peering_connection,
        AcceptVpcPeeringConnection => vpc_peering_connection::accept_vpc_peering_connection,
        RejectVpcPeeringConnection => vpc_peering_connection::reject_vpc_peering_connection,
        DeleteVpcPeeringConnection => vpc_peering_connection::delete_vpc_peering_connection,
        DescribeVpcPeeringConnections => vpc_peering_connection::describe_vpc_peering_connections,
        ModifyVpcPeeringConnectionOptions => vpc_peering_connection::modify_vpc_peering_connection_options,
        DescribeStaleSecurityGroups => stale_security_group::describe_stale_security_groups,
        DescribeSecurityGroupReferences => stale_security_group::describe_security_group_references,
    }
    later {
        CreateKeyPair => later::create_key_pair,
        GetConsoleOutput => later::get_console_output,
    }
}
