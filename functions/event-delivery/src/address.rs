//! Which addresses an event may be sent to: those of the public internet, and no others.
//!
//! A customer writes down the address, so it may be one of ours. The check is made on the very addresses that are then connected to:
//! the client's resolver gives out none that was not checked, so that a name that resolves differently the second time gains nothing.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use shared::{Error, Result};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};
use url::{Host, Url};

/// Blocks of the IANA registry of special-purpose IPv4 addresses that lead to no public host, multicast, the reserved rest, and the
/// address at which Azure tells its machines about themselves, which is in nobody's block.
const NOT_PUBLIC_V4: &[(Ipv4Addr, u32)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 31, 196, 0), 24),
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(192, 175, 48, 0), 24),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// What is given out as global unicast. Everything else (loopback, unique local, link-local, multicast, mapped and translated IPv4) lies
/// outside.
const PUBLIC_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// Blocks within it that lead to no public host, or to an IPv4 address in disguise (Teredo in `2001::/23`, 6to4).
const NOT_PUBLIC_V6: &[(Ipv6Addr, u32)] = &[
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0x0db8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x2620, 0x004f, 0x8000, 0, 0, 0, 0, 0), 48),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Whether an address is one of the public internet.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_PUBLIC_V4.iter().any(|&(block, prefix)| {
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            address.to_bits() & mask == block.to_bits()
        }),
        IpAddr::V6(address) => {
            let within = |(block, prefix): (Ipv6Addr, u32)| {
                let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
                address.to_bits() & mask == block.to_bits()
            };
            within(PUBLIC_V6) && !NOT_PUBLIC_V6.iter().copied().any(within)
        }
    }
}

/// Reads an endpoint's URL, and refuses (422) what can be seen to be wrong without asking for its name: only `https`, no user name, no
/// address that is not public. With `local`, plain `http` to a loopback address that is spelled out passes too.
pub fn read_url(text: &str, local: bool) -> Result<Url> {
    let refused =
        |message: &str| Err(Error::new(http::StatusCode::UNPROCESSABLE_ENTITY, "invalid_url", message).at("url"));
    let Ok(url) = Url::parse(text) else { return refused("that is no URL") };
    let literal = match url.host() {
        Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
        Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
        Some(Host::Domain(_)) => None,
        None => return refused("the URL names no host"),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return refused("an endpoint's URL carries no user name");
    }
    let is_own = local && literal.is_some_and(|address| address.is_loopback());
    match url.scheme() {
        "https" => {}
        "http" if is_own => {}
        _ => return refused("an endpoint's URL begins with https://"),
    }
    match literal {
        Some(address) if !is_own && !is_public(address) => refused("that address is not one of the public internet"),
        _ => Ok(url),
    }
}

/// A name led to an address that is not public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPublic;

impl std::fmt::Display for NotPublic {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("the name resolves to an address that is not one of the public internet")
    }
}

impl std::error::Error for NotPublic {}

/// The resolver of the sender's client: what it gives out is what is connected to.
pub(crate) struct PublicOnly(pub(crate) Arc<dyn Resolve>);

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        let asked = self.0.resolve(name);
        Box::pin(async move {
            let found: Vec<SocketAddr> = asked.await?.collect();
            // One that is not public among them, and none is taken: nobody has both by mistake.
            if found.is_empty() || found.iter().any(|address| !is_public(address.ip())) {
                return Err(NotPublic.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The system's resolver.
pub(crate) struct System;

impl Resolve for System {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests;
