//! What the tests of the resources stand on: a world in memory with two accounts.

use crate::auth::Principal;
use crate::error::ApiError;
use crate::model::{AttachmentState, Instance, InstanceState, NetworkInterface, NetworkInterfaceAttachment, Subnet, Time, Vpc};
use crate::resource::network_interface::{self, NewInterface, Wanted};
use crate::resource::vpc;
use crate::world::{Call, Region, World};

pub(crate) const ALICE: &str = "111111111111";
pub(crate) const BOB: &str = "222222222222";

pub(crate) struct Fixture {
    pub(crate) world: World,
}

impl Fixture {
    /// Both accounts own a default VPC.
    pub(crate) fn new() -> Self {
        let world = World::in_memory(Region::for_tests(), 42);
        for account in [ALICE, BOB] {
            world.transact(|tx| vpc::default_vpc_insert(tx, world.region(), account, Time(0))).0.unwrap();
        }
        Self { world }
    }

    /// Runs an action of an account.
    pub(crate) fn call<T>(&self, account: &str, action: impl FnOnce(&mut Call<'_>) -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.world.call(&Principal::for_test(account), Time(1_700_000_000_000), action).0
    }

    /// The code with which an action of an account is refused.
    pub(crate) fn refusal<T>(&self, account: &str, action: impl FnOnce(&mut Call<'_>) -> Result<T, ApiError>) -> String {
        self.call(account, action).err().expect("refused").code.into_owned()
    }

    pub(crate) fn default_vpc(&self, account: &str) -> Vpc {
        Vpc::clone(&vpc::default_vpc(&self.world.begin(), account).unwrap())
    }

    /// The default subnet of the first zone.
    pub(crate) fn default_subnet(&self, account: &str) -> Subnet {
        let tx = self.world.begin();
        let subnet = tx.list::<Subnet>(account).find(|subnet| subnet.zone == "us-east-1a" && subnet.default_for_zone).unwrap();
        Subnet::clone(subnet)
    }

    /// An interface in a subnet, attached to an instance of this name if there is one.
    pub(crate) fn interface(&self, account: &str, subnet_id: &str, instance_id: Option<&str>) -> Result<NetworkInterface, ApiError> {
        self.call(account, |call| {
            let subnet = call.get::<Subnet>(subnet_id).unwrap();
            let security_group_ids = network_interface::checked_groups(&call.tx, account, &subnet.vpc_id, &[])?;
            let attachment = instance_id.map(|instance_id| NetworkInterfaceAttachment {
                id: "eni-attach-00000001".into(),
                instance_id: instance_id.into(),
                device_index: 0,
                attach_time: call.now,
                delete_on_termination: true,
                state: AttachmentState::Attached,
            });
            let new = NewInterface {
                subnet: &subnet,
                addresses: Wanted::default(),
                security_group_ids,
                description: String::new(),
                attachment,
                associate_public_ip: true,
                connection_tracking: Default::default(),
            };
            network_interface::insert(&mut call.tx, call.now, new)
        })
    }

    /// A running instance, as far as the network is concerned, with its interface in the account's default subnet.
    pub(crate) fn instance(&self, account: &str, id: &str) -> NetworkInterface {
        let subnet = self.default_subnet(account);
        let document = serde_json::json!({
            "account_id": account, "id": id, "reservation_id": "r-00000001", "launch_index": 0, "image_id": "ami-00000001",
            "instance_type": "t3.micro", "state": InstanceState::Running, "state_reason": null, "transition_reason": "",
            "key_name": null, "vpc_id": subnet.vpc_id, "subnet_id": subnet.id, "zone": subnet.zone, "private_ip": null,
            "user_data": [], "metadata_options": {"enabled": true, "tokens_required": true, "hop_limit": 2, "tags_enabled": false},
            "disable_api_termination": false, "terminate_on_shutdown": false, "ebs_optimized": false, "monitoring": false,
            "cpu_credits": null, "root_device_name": "/dev/xvda", "architecture": "x86_64", "platform": "Linux", "boot": null,
            "launch_time": 0, "created": 0, "terminated": null, "client_token": null, "placement": null, "boot_count": 0,
        });
        let instance: Instance = serde_json::from_value(document).unwrap();
        self.call(account, |call| {
            call.tx.put(instance);
            Ok(())
        })
        .unwrap();
        self.interface(account, &subnet.id, Some(id)).unwrap()
    }
}
