use super::*;
use proptest::prelude::*;

/// Every block of IANA's two special-purpose registries (as of 2025-10), multicast and the reserved rest, and the ways in which an
/// IPv4 address hides in an IPv6 one.
const SPECIAL: &[&str] = &[
    "0.0.0.0/8",
    "0.0.0.0/32",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.0.0/29",
    "192.0.0.8/32",
    "192.0.0.9/32",
    "192.0.0.10/32",
    "192.0.0.170/32",
    "192.0.0.171/32",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.88.99.2/32",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::1/128",
    "::/128",
    "::/96",
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/23",
    "2001::/32",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:1::3/128",
    "2001:2::/48",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:30::/28",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];
/// What machines in a cloud are told by: none of it is in reach.
const METADATA: &[&str] = &[
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fe80::a9fe:a9fe",
];
const PUBLIC: &[&str] = &[
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::1",
    "2606:4700::1111",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2a00:1450::1",
    "3ffe::1",
];

/// The addresses of a block, as the first, the last, and how many bits are free.
fn block(text: &str) -> (IpAddr, u32) {
    let (network, prefix) = text.split_once('/').unwrap();
    (network.parse().unwrap(), prefix.parse().unwrap())
}

/// An address of a block, with its free bits taken from `bits`.
fn within(text: &str, bits: u128) -> IpAddr {
    match block(text) {
        (IpAddr::V4(network), prefix) => {
            let free = u32::MAX.checked_shr(prefix).unwrap_or(0);
            Ipv4Addr::from_bits(network.to_bits() | (bits as u32 & free)).into()
        }
        (IpAddr::V6(network), prefix) => {
            let free = u128::MAX.checked_shr(prefix).unwrap_or(0);
            Ipv6Addr::from_bits(network.to_bits() | (bits & free)).into()
        }
    }
}

#[test]
fn no_special_block_is_public_from_its_first_address_to_its_last() {
    for text in SPECIAL {
        for bits in [0, u128::MAX] {
            assert!(!is_public(within(text, bits)), "{text}: {}", within(text, bits));
        }
    }
    for text in METADATA {
        assert!(!is_public(text.parse().unwrap()), "{text}");
    }
}

#[test]
fn what_lies_beside_the_blocks_is_public() {
    for text in PUBLIC {
        assert!(is_public(text.parse().unwrap()), "{text}");
    }
}

proptest! {
    #[test]
    fn no_address_of_a_special_block_is_public(text in prop::sample::select(SPECIAL), bits: u128) {
        prop_assert!(!is_public(within(text, bits)));
    }

    #[test]
    fn no_ipv4_address_is_reached_through_ipv6(bits: u32, tail: u128) {
        let four = u128::from(bits);
        for disguised in [
            four,
            0xffff_0000_0000 | four,
            0xffff_0000_0000_0000 | four,
            0x0064_ff9b << 96 | four,
            0x0064_ff9b_0001 << 80 | four,
            0x2002 << 112 | four << 80 | (tail & (u128::MAX >> 48)),
            0x2001_0000 << 96 | (tail & (u128::MAX >> 32)),
        ] {
            prop_assert!(!is_public(Ipv6Addr::from_bits(disguised).into()), "{}", Ipv6Addr::from_bits(disguised));
        }
    }

    #[test]
    fn an_ipv4_address_is_public_unless_a_block_has_it(bits: u32) {
        let address = Ipv4Addr::from_bits(bits);
        let special = SPECIAL.iter().filter(|text| text.contains('.')).any(|text| match block(text) {
            (IpAddr::V4(network), prefix) => bits ^ network.to_bits() <= u32::MAX.checked_shr(prefix).unwrap_or(0),
            (IpAddr::V6(_), _) => false,
        });
        prop_assert_eq!(is_public(address.into()), !special && address != Ipv4Addr::new(168, 63, 129, 16));
    }

    #[test]
    fn no_spelling_of_a_private_address_passes_as_a_url(bits: u32) {
        let address = Ipv4Addr::from_bits(bits);
        let [a, b, c, d] = address.octets();
        for host in [
            format!("{address}"), format!("{bits}"), format!("0x{bits:x}"), format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"),
            format!("{a}.{b}.{}", u32::from(c) << 8 | u32::from(d)), format!("[::ffff:{address}]"), format!("{address}."),
        ] {
            let passes = read_url(&format!("https://{host}/hook"), false).is_ok();
            prop_assert!(!passes || is_public(address.into()), "{}", host);
        }
    }
}

#[test]
fn an_endpoint_is_https_and_public_and_names_nobody() {
    for (text, remote, local) in [
        ("https://hooks.example.com/trunkline", true, true),
        ("https://hooks.example.com:8443/", true, true),
        ("http://hooks.example.com/", false, false),
        ("ftp://hooks.example.com/", false, false),
        ("https://user:pass@hooks.example.com/", false, false),
        ("https://10.0.0.1/", false, false),
        ("https://[fd00::1]/", false, false),
        ("http://127.0.0.1:3000/hook", false, true),
        ("http://[::1]:3000/hook", false, true),
        ("http://localhost:3000/hook", false, false),
        ("http://10.0.0.1/", false, false),
        ("file:///etc/passwd", false, false),
        ("nonsense", false, false),
    ] {
        assert_eq!((read_url(text, false).is_ok(), read_url(text, true).is_ok()), (remote, local), "{text}");
    }
}
