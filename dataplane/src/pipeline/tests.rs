#![allow(clippy::cast_possible_truncation)]

mod flows;
mod garbage;
mod inspect;
mod lab;
mod model;
mod public;
mod services;
mod vpc;
