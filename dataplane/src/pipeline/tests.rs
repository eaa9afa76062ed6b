#![allow(clippy::cast_possible_truncation)]

mod differential;
mod flows;
mod garbage;
mod lab;
mod model;
mod public;
mod services;
mod vpc;
