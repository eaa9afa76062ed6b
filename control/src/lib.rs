//! Control plane of a region: the EC2 API, the rows behind it, placement, and the loop that makes cards agree with the rows.
//!
//! | where | what |
//! |---|---|
//! | [`server`], [`api`], [`rest`], [`auth`], [`throttle`] | the listener, its two skins, who is speaking, and how often |
//! | [`shape`], [`shapes`], [`query`], [`xml`], [`error`] | typed requests and answers, and their form on the wire |
//! | [`resource`], [`later`] | one file for each noun, one function for each action |
//! | [`world`], [`model`], [`store`], [`event`] | tables in memory, rows, their durability, and what happened |
//! | [`placement`], [`reconcile`], [`cards`] | where instances go, and how the cards come to know |
//! | [`settings`], [`admin`], [`packets`], [`metrics`] | for the operator |
//!
//! The launch path is drawn at the head of [`api`].

pub mod admin;
pub mod api;
pub mod auth;
pub mod cards;
pub mod error;
pub mod event;
pub mod later;
pub mod metrics;
pub mod model;
pub mod packets;
pub mod placement;
pub mod query;
pub mod reconcile;
pub mod resource;
pub mod rest;
pub mod server;
pub mod settings;
pub mod shape;
pub mod shapes;
pub mod store;
pub mod throttle;
pub mod world;
pub mod xml;
