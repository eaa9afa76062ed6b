#![allow(clippy::cast_possible_truncation)]

mod acl;
mod addresses;
mod differential;
mod flows;
mod garbage;
mod lab;
mod limits;
mod model;
mod nat_gateway;
mod public;
mod routes;
mod services;
mod vpc;
