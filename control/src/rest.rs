//! The REST interface under `/api/v1`: the second skin over the same actions.
//!
//! | request | action |
//! |---|---|
//! | `POST /instances` | RunInstances |
//! | `GET /instances?instanceIds=&maxResults=&nextToken=` | DescribeInstances |
//! | `PUT /instances/{id}` | ModifyInstanceAttribute, all members in one transaction |
//! | `POST /instances/{id}/start`, `stop`, `terminate` | StartInstances, StopInstances, TerminateInstances |
//! | `POST /volumes`, `GET /volumes?volumeIds=` | CreateVolume, DescribeVolumes |
//! | `POST /volumes/{id}/attach`, `detach` | AttachVolume, DetachVolume |
//! | `DELETE /volumes/{id}` | DeleteVolume |
//!
//! A body is read into one of the structs below, becomes the typed request that the Query protocol would have made, and goes
//! the same way. Errors keep EC2's codes and get the status that REST expects.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::api::{Api, RequestId, response};
use crate::auth::{Principal, Service};
use crate::error::ApiError;
use crate::query::Form;
use crate::resource::{instance, volume};
use crate::server;
use crate::shape::Timestamp;
use crate::shapes::{
    AttachVolumeRequest, AttributeValue, BlockDeviceMapping, CreateVolumeRequest, DeleteVolumeRequest, DescribeInstancesRequest,
    DescribeVolumesRequest, DetachVolumeRequest, EbsBlockDevice, Instance, InstanceState, InstanceStateChange,
    ModifyInstanceAttributeRequest, RunInstancesRequest, StartInstancesRequest, StopInstancesRequest, Tag, TagSpecification,
    TerminateInstancesRequest, Volume, VolumeAttachment,
};
use crate::throttle::Ask;
use crate::world::{Call, Sequence};

/// Answers one request under `/api/v1`.
pub async fn handle(State(api): State<Arc<Api>>, request: Request) -> Response {
    let (id, since) = (RequestId::new(), Instant::now());
    let (parts, body) = request.into_parts();
    let mut action = "none";
    let result = run(&api, &parts, body, &mut action).await;
    let (status, body) = match &result {
        Ok(body) => (200, body.to_string()),
        Err(error) => {
            let error_body = json!({"code": error.code, "message": error.message});
            (status(error), json!({"error": error_body, "requestId": id.as_str()}).to_string())
        }
    };
    api.answered(action, &id, status, result.as_ref().err(), since);
    response(status, "application/json", &id, body)
}

async fn run(api: &Api, parts: &Parts, body: Body, action: &mut &'static str) -> Result<Value, ApiError> {
    let body = server::read_body(&parts.headers, body).await?;
    let (principal, service) = api.verify(parts, &body)?;
    if service == Service::Sts {
        let message = "Credential should be scoped to correct service: 'execute-api' or 'ec2'.";
        return Err(ApiError::with_status(403, "SignatureDoesNotMatch", message));
    }
    let (name, handler) = route(parts)?;
    *action = name;
    let query = parts.uri.query().unwrap_or_default();
    let ask = ask(name, query, &body);
    api.admit(&principal, ask)?;
    let (result, sequence) = handler(&Context { api, principal: &principal, query, body: &body });
    if result.is_err() {
        api.give_back(&principal, ask);
    }
    // A refusal tells of the state as much as an answer does.
    api.durable(sequence).await?;
    result
}

/// What the throttle has to know. What the action will refuse costs no instances here.
fn ask(action: &'static str, query: &str, body: &[u8]) -> Ask {
    let paged = |form: Form<'_>| form.parameters().iter().any(|parameter| matches!(parameter.name, "maxResults" | "nextToken"));
    let unbounded = !Form::parse(query, b"").is_ok_and(paged);
    let instances = match action {
        "RunInstances" => serde_json::from_slice(body).map_or(0, |Count { max_count }| max_count.try_into().unwrap_or(0)),
        // The path names one.
        _ => 1,
    };
    Ask { action, unbounded, instances }
}

/// The one field of a launch that the throttle needs.
#[derive(Deserialize)]
struct Count {
    #[serde(rename = "maxCount", default = "one")]
    max_count: i32,
}

/// A request on its way to its action.
struct Context<'a> {
    api: &'a Api,
    principal: &'a Principal,
    query: &'a str,
    body: &'a Bytes,
}

type Outcome = (Result<Value, ApiError>, Sequence);
type Handler<'a> = Box<dyn FnOnce(&Context<'_>) -> Outcome + Send + 'a>;

/// Finds the action of a method and a path; a path that exists with other methods only answers 405.
fn route(parts: &Parts) -> Result<(&'static str, Handler<'_>), ApiError> {
    let path = parts.uri.path();
    let segments: Vec<&str> = path.strip_prefix("/api/v1/").unwrap_or_default().split('/').collect();
    let method = parts.method.as_str();
    Ok(match (method, segments.as_slice()) {
        ("POST", ["instances"]) => ("RunInstances", Box::new(|context| context.launch())),
        ("GET", ["instances"]) => ("DescribeInstances", Box::new(|context| context.instances())),
        ("PUT", ["instances", id]) => ("ModifyInstanceAttribute", Box::new(|context| context.modify(id))),
        ("POST", ["instances", id, "start"]) => ("StartInstances", Box::new(|context| context.start(id))),
        ("POST", ["instances", id, "stop"]) => ("StopInstances", Box::new(|context| context.stop(id))),
        ("POST", ["instances", id, "terminate"]) => ("TerminateInstances", Box::new(|context| context.terminate(id))),
        ("POST", ["volumes"]) => ("CreateVolume", Box::new(|context| context.create_volume())),
        ("GET", ["volumes"]) => ("DescribeVolumes", Box::new(|context| context.volumes())),
        ("DELETE", ["volumes", id]) => ("DeleteVolume", Box::new(|context| context.delete_volume(id))),
        ("POST", ["volumes", id, "attach"]) => ("AttachVolume", Box::new(|context| context.attach(id))),
        ("POST", ["volumes", id, "detach"]) => ("DetachVolume", Box::new(|context| context.detach(id))),
        (
            _,
            ["instances" | "volumes"]
            | ["instances" | "volumes", _]
            | ["instances", _, "start" | "stop" | "terminate"]
            | ["volumes", _, "attach" | "detach"],
        ) => return Err(ApiError::with_status(405, "MethodNotAllowed", format!("{path} does not take {method}"))),
        _ => return Err(ApiError::with_status(404, "InvalidAction", format!("There is nothing at {path}"))),
    })
}

impl Context<'_> {
    fn launch(&self) -> Outcome {
        self.act(|body: Launch| {
            let mut request = RunInstancesRequest {
                image_id: body.image_id,
                instance_type: body.instance_type,
                key_name: body.key_name,
                security_group_ids: body.security_group_ids,
                subnet_id: body.subnet_id,
                user_data: body.user_data.map(|text| BASE64.encode(text)),
                min_count: Some(body.min_count),
                max_count: Some(body.max_count),
                client_token: body.client_token,
                ..RunInstancesRequest::default()
            };
            request.block_device_mappings = body.storage.volumes.into_iter().map(LaunchVolume::into_mapping).collect();
            request.tag_specifications = tag_specification("instance", body.tags);
            move |call| {
                let reservation = instance::run_instances(call, request)?;
                let instances = reservation.instances.iter().map(launched_json);
                Ok(json!({"instances": instances.collect::<Vec<_>>()}))
            }
        })
    }

    fn instances(&self) -> Outcome {
        self.list(["instanceIds", "maxResults", "nextToken"], |instance_ids, max_results, next_token| {
            let request = DescribeInstancesRequest { instance_ids, max_results, next_token, ..Default::default() };
            move |call| {
                let result = instance::describe_instances(call, request)?;
                let instances = result.reservations.iter().flat_map(|reservation| &reservation.instances);
                Ok(page("instances", instances.map(instance_json).collect(), result.next_token))
            }
        })
    }

    fn modify(&self, id: &str) -> Outcome {
        self.act(|body: Modify| {
            let id = id.to_owned();
            move |call| {
                if body.instance_type.is_none() && body.security_group_ids.is_none() {
                    return Err(ApiError::missing_parameter("instanceType or securityGroupIds"));
                }
                let mut modifications = serde_json::Map::new();
                let attribute = || ModifyInstanceAttributeRequest { instance_id: Some(id.clone()), ..Default::default() };
                if let Some(instance_type) = body.instance_type {
                    let value = Some(AttributeValue { value: Some(instance_type.clone()) });
                    instance::modify_instance_attribute(call, ModifyInstanceAttributeRequest { instance_type: value, ..attribute() })?;
                    modifications.insert("instanceType".to_owned(), instance_type.into());
                }
                if let Some(groups) = body.security_group_ids {
                    if groups.is_empty() {
                        return Err(ApiError::invalid_value("An interface belongs to at least one security group"));
                    }
                    let request = ModifyInstanceAttributeRequest { groups: groups.clone(), ..attribute() };
                    instance::modify_instance_attribute(call, request)?;
                    modifications.insert("securityGroups".to_owned(), groups.into());
                }
                Ok(json!({"instanceId": id, "modifications": modifications}))
            }
        })
    }

    fn start(&self, id: &str) -> Outcome {
        self.act(|_: Nothing| {
            let request = StartInstancesRequest { instance_ids: vec![id.to_owned()], ..Default::default() };
            move |call| change_json(&instance::start_instances(call, request)?.starting_instances)
        })
    }

    fn stop(&self, id: &str) -> Outcome {
        self.act(|body: Stop| {
            let (hibernate, force) = (body.hibernate, body.force);
            let request = StopInstancesRequest { instance_ids: vec![id.to_owned()], hibernate, force, ..Default::default() };
            move |call| change_json(&instance::stop_instances(call, request)?.stopping_instances)
        })
    }

    fn terminate(&self, id: &str) -> Outcome {
        self.act(|_: Nothing| {
            let request = TerminateInstancesRequest { instance_ids: vec![id.to_owned()], ..Default::default() };
            move |call| change_json(&instance::terminate_instances(call, request)?.terminating_instances)
        })
    }

    fn create_volume(&self) -> Outcome {
        self.act(|body: NewVolume| {
            let request = CreateVolumeRequest {
                availability_zone: Some(body.availability_zone),
                volume_type: body.volume_type,
                size: body.size,
                encrypted: body.encrypted,
                kms_key_id: body.kms_key_id,
                iops: body.iops,
                throughput: body.throughput,
                snapshot_id: body.snapshot_id,
                client_token: body.client_token,
                tag_specifications: tag_specification("volume", body.tags),
                ..CreateVolumeRequest::default()
            };
            move |call| volume::create_volume(call, request).map(|volume| volume_json(&volume))
        })
    }

    fn volumes(&self) -> Outcome {
        self.list(["volumeIds", "maxResults", "nextToken"], |volume_ids, max_results, next_token| {
            let request = DescribeVolumesRequest { volume_ids, max_results, next_token, ..Default::default() };
            move |call| {
                let result = volume::describe_volumes(call, request)?;
                Ok(page("volumes", result.volumes.iter().map(volume_json).collect(), result.next_token))
            }
        })
    }

    fn delete_volume(&self, id: &str) -> Outcome {
        self.act(|_: Nothing| {
            let id = id.to_owned();
            move |call| {
                volume::delete_volume(call, DeleteVolumeRequest { volume_id: Some(id.clone()), ..Default::default() })?;
                Ok(json!({"volumeId": id, "state": "deleting"}))
            }
        })
    }

    fn attach(&self, id: &str) -> Outcome {
        self.act(|body: Attach| {
            let request = AttachVolumeRequest {
                volume_id: Some(id.to_owned()),
                instance_id: Some(body.instance_id),
                device: Some(body.device),
                ..Default::default()
            };
            move |call| volume::attach_volume(call, request).map(|attachment| attachment_json(&attachment))
        })
    }

    fn detach(&self, id: &str) -> Outcome {
        self.act(|body: Detach| {
            let request = DetachVolumeRequest {
                volume_id: Some(id.to_owned()),
                instance_id: body.instance_id,
                device: body.device,
                force: body.force,
                ..Default::default()
            };
            move |call| volume::detach_volume(call, request).map(|attachment| attachment_json(&attachment))
        })
    }

    /// Reads the body and runs what is made of it. An empty body counts as `{}`.
    fn act<B: DeserializeOwned, F>(&self, action: impl FnOnce(B) -> F) -> Outcome
    where
        F: FnOnce(&mut Call<'_>) -> Result<Value, ApiError>,
    {
        let body = if self.body.is_empty() { b"{}" } else { self.body.as_ref() };
        match serde_json::from_slice(body) {
            Ok(body) => self.api.act(self.principal, false, action(body)),
            Err(error) => (Err(wrong_body(&error)), Sequence::default()),
        }
    }

    /// Reads the query of a listing: ids separated by commas, and a page.
    fn list<F>(&self, names: [&str; 3], action: impl FnOnce(Vec<String>, Option<i32>, Option<String>) -> F) -> Outcome
    where
        F: FnOnce(&mut Call<'_>) -> Result<Value, ApiError>,
    {
        let read = || {
            let form = Form::parse(self.query, b"")?;
            let unknown = form.parameters().into_iter().find(|parameter| !names.contains(&parameter.name));
            if let Some(parameter) = unknown {
                return Err(ApiError::unknown_parameter(parameter.name));
            }
            let [ids, max_results, next_token] = names;
            let ids = form.single(ids)?.unwrap_or_default().split(',').filter(|id| !id.is_empty()).map(str::to_owned);
            let max = form.single(max_results)?;
            let max = max.map(|text| text.parse().map_err(|_| ApiError::invalid_parameter(max_results, text)));
            Ok((ids.collect(), max.transpose()?, form.single(next_token)?.map(str::to_owned)))
        };
        match read() {
            Ok((ids, max, token)) => self.api.act(self.principal, false, action(ids, max, token)),
            Err(error) => (Err(error), Sequence::default()),
        }
    }
}

/// The body of a launch.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Launch {
    image_id: Option<String>,
    instance_type: Option<String>,
    key_name: Option<String>,
    #[serde(default)]
    security_group_ids: Vec<String>,
    subnet_id: Option<String>,
    /// Plain text, while the Query protocol has base64.
    user_data: Option<String>,
    #[serde(default)]
    storage: Storage,
    #[serde(default)]
    tags: Vec<TagBody>,
    #[serde(default = "one")]
    min_count: i32,
    #[serde(default = "one")]
    max_count: i32,
    client_token: Option<String>,
}

fn one() -> i32 {
    1
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Storage {
    #[serde(default)]
    volumes: Vec<LaunchVolume>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LaunchVolume {
    device_name: String,
    volume_type: Option<String>,
    volume_size: Option<i32>,
    delete_on_termination: Option<bool>,
    iops: Option<i32>,
    throughput: Option<i32>,
    encrypted: Option<bool>,
    kms_key_id: Option<String>,
    snapshot_id: Option<String>,
}

impl LaunchVolume {
    fn into_mapping(self) -> BlockDeviceMapping {
        let ebs = EbsBlockDevice {
            volume_type: self.volume_type,
            volume_size: self.volume_size,
            delete_on_termination: self.delete_on_termination,
            iops: self.iops,
            throughput: self.throughput,
            encrypted: self.encrypted,
            kms_key_id: self.kms_key_id,
            snapshot_id: self.snapshot_id,
            ..EbsBlockDevice::default()
        };
        BlockDeviceMapping { device_name: Some(self.device_name), ebs: Some(ebs), ..BlockDeviceMapping::default() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TagBody {
    key: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Modify {
    instance_type: Option<String>,
    security_group_ids: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stop {
    hibernate: Option<bool>,
    force: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewVolume {
    availability_zone: String,
    volume_type: Option<String>,
    size: Option<i32>,
    encrypted: Option<bool>,
    kms_key_id: Option<String>,
    iops: Option<i32>,
    throughput: Option<i32>,
    snapshot_id: Option<String>,
    client_token: Option<String>,
    #[serde(default)]
    tags: Vec<TagBody>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Attach {
    instance_id: String,
    device: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Detach {
    instance_id: Option<String>,
    device: Option<String>,
    force: Option<bool>,
}

fn tag_specification(resource_type: &str, tags: Vec<TagBody>) -> Vec<TagSpecification> {
    if tags.is_empty() {
        return Vec::new();
    }
    let tags = tags.into_iter().map(|tag| Tag { key: Some(tag.key), value: Some(tag.value) }).collect();
    vec![TagSpecification { resource_type: Some(resource_type.to_owned()), tags }]
}

/// EC2's codes for serde's complaints, which name the field in back quotes.
fn wrong_body(error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    let field = |prefix: &str| text.strip_prefix(prefix)?.split_once('`').map(|(field, _)| field);
    if let Some(field) = field("missing field `") {
        return ApiError::missing_parameter(field);
    }
    if let Some(field) = field("unknown field `") {
        return ApiError::unknown_parameter(field);
    }
    let code = if error.is_data() { "InvalidParameterValue" } else { "MalformedRequestBody" };
    ApiError::new(code, format!("The request body is not the expected JSON: {text}"))
}

fn page(name: &str, items: Vec<Value>, next_token: Option<String>) -> Value {
    let mut page = json!({name: items});
    if let (Some(token), Some(page)) = (next_token, page.as_object_mut()) {
        page.insert("nextToken".to_owned(), token.into());
    }
    page
}

/// A launched instance, as the launch answers it.
fn launched_json(instance: &Instance) -> Value {
    json!({
        "instanceId": instance.instance_id,
        "state": state(instance.state.as_ref()),
        "instanceType": instance.instance_type,
        "launchTime": instance.launch_time.map(Timestamp::to_text_seconds),
        "privateIpAddress": instance.private_ip_address,
        "publicIpAddress": instance.public_ip_address,
    })
}

fn instance_json(instance: &Instance) -> Value {
    let groups = instance.security_groups.iter().map(|group| json!({"groupId": group.group_id, "groupName": group.group_name}));
    json!({
        "instanceId": instance.instance_id,
        "state": state(instance.state.as_ref()),
        "instanceType": instance.instance_type,
        "imageId": instance.image_id,
        "launchTime": instance.launch_time.map(Timestamp::to_text_seconds),
        "privateIpAddress": instance.private_ip_address,
        "publicIpAddress": instance.public_ip_address,
        "vpcId": instance.vpc_id,
        "subnetId": instance.subnet_id,
        "keyName": instance.key_name,
        "availabilityZone": instance.placement.as_ref().and_then(|placement| placement.availability_zone.as_ref()),
        "securityGroups": groups.collect::<Vec<_>>(),
        "tags": tags_json(&instance.tags),
    })
}

fn state(state: Option<&InstanceState>) -> Option<&str> {
    state.and_then(|state| state.name.as_deref())
}

fn tags_json(tags: &[Tag]) -> Vec<Value> {
    tags.iter().map(|tag| json!({"key": tag.key, "value": tag.value})).collect()
}

fn change_json(changes: &[InstanceStateChange]) -> Result<Value, ApiError> {
    let change = changes.first().ok_or_else(ApiError::internal)?;
    Ok(json!({
        "instanceId": change.instance_id,
        "previousState": state(change.previous_state.as_ref()),
        "currentState": state(change.current_state.as_ref()),
    }))
}

fn volume_json(volume: &Volume) -> Value {
    json!({
        "volumeId": volume.volume_id,
        "state": volume.state,
        "size": volume.size,
        "volumeType": volume.volume_type,
        "availabilityZone": volume.availability_zone,
        "encrypted": volume.encrypted,
        "kmsKeyId": volume.kms_key_id,
        "iops": volume.iops,
        "throughput": volume.throughput,
        "createTime": volume.create_time.map(Timestamp::to_text_seconds),
        "attachments": volume.attachments.iter().map(attachment_json).collect::<Vec<_>>(),
        "tags": tags_json(&volume.tags),
    })
}

fn attachment_json(attachment: &VolumeAttachment) -> Value {
    json!({
        "volumeId": attachment.volume_id,
        "instanceId": attachment.instance_id,
        "device": attachment.device,
        "state": attachment.state,
    })
}

/// The status that REST expects: EC2's own is 400 for most.
fn status(error: &ApiError) -> u16 {
    if error.status != 400 {
        return error.status;
    }
    let code = error.code.as_ref();
    let conflict = [
        "IncorrectInstanceState",
        "IncorrectState",
        "InvalidState",
        "VolumeInUse",
        "DependencyViolation",
        "IdempotentParameterMismatch",
        "Resource.AlreadyAssociated",
    ];
    if code.ends_with(".NotFound") {
        404
    } else if conflict.contains(&code) || code.ends_with(".Duplicate") || code.ends_with(".InUse") {
        409
    } else {
        400
    }
}
