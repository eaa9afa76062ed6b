//! What the agent and its machines cannot do.
//!
//! The agent leaves the network before it does anything else: it and all its
//! children live in an empty network namespace, where even loopback is down,
//! and no exec can raise their privileges. A machine's process also gets a
//! session of its own, so that no signal meant for the agent reaches it, and
//! leaves no core file: it would hold the guest's memory.
#![allow(unsafe_code)]

use rustix::fd::OwnedFd;
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit};
use rustix::thread::UnshareFlags;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Leaves the network, for this process and all that it starts. Call it while
/// there is one thread only.
///
/// # Errors
/// Without the privilege to do it.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: only unsharing file descriptors could harm memory safety, and
    // this unshares the network namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Gives up the raising of privileges by exec, for this process and all that it
/// starts, and keeps from them the files that whoever started it left open.
///
/// # Errors
/// None known on Linux 5.11 and later.
pub fn give_up_privileges() -> io::Result<()> {
    let flag = libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or_default();
    // SAFETY: this closes nothing: it marks the files of this process, behind
    // the three standard ones, to be closed when it starts another.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, flag) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Prepares the process of a machine. It inherits `held` and keeps it open for
/// its whole life: a lock on it tells whether the process lives.
pub fn machine(command: &mut Command, held: OwnedFd) {
    let child = move || {
        rustix::process::setsid()?;
        rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
        rustix::io::fcntl_setfd(&held, FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes three system calls
    // through rustix, which neither allocates nor locks for them.
    unsafe { command.pre_exec(child) };
}
