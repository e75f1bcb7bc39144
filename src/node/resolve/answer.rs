//! What resolvers say of a name, and for how long that may be believed.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::{BoxFuture, Either, select};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record};
use tokio::time::timeout;

/// The longest that addresses are remembered, whatever their TTL. A run is short and a target's address may move
/// meanwhile: records that live for a day must not hold a page back until the run's end.
const POSITIVE_MAX: Duration = Duration::from_secs(5 * 60);
/// The longest that the absence of an address is remembered. Source: Tailscale, net/dns/resolver, negative TTL of 10 s.
const NEGATIVE_MAX: Duration = Duration::from_secs(10);
/// The most addresses of an answer that are kept. Sixteen are dialled at most; more matter only where no route covers
/// the first.
const ADDRESSES_MAX: usize = 256;
/// How much later than the first family's addresses the other family's may come. Longer than the delay of RFC 8305, 3
/// (50 ms): a route may cover only the later ones.
const LATER_FAMILY: Duration = Duration::from_secs(1);

/// What a resolver says of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) says: Says,
    /// How long it may be remembered; zero for not at all.
    pub(super) ttl: Duration,
}

/// What there is of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Says {
    /// These addresses; at least one.
    Addresses(Vec<IpAddr>),
    /// The name, without an address.
    NoAddress,
    /// No such name.
    NoName,
}

/// Why a resolver's answer does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// It answered that it cannot answer, or nonsense; carries what, as `SERVFAIL`.
    Answered(String),
    /// It does not let us ask.
    Forbidden,
    /// It could not be reached; carries why.
    Unreachable(String),
    /// Nothing came in time.
    Silent,
}

/// What a message says. Aliases do not matter: whatever addresses it holds are those at the end of their chain.
pub(super) fn read(message: &Message) -> Result<Answer, Failure> {
    let code = message.metadata.response_code;
    if code == ResponseCode::NXDomain {
        return Ok(none(Says::NoName, negative_ttl(&message.authorities)));
    }
    if code != ResponseCode::NoError {
        return Err(Failure::Answered(rcode(code)));
    }
    if message.metadata.truncation {
        return Err(Failure::Answered("a truncated message".to_owned()));
    }
    Ok(found(&message.answers).unwrap_or_else(|| none(Says::NoAddress, negative_ttl(&message.authorities))))
}

fn found(records: &[Record]) -> Option<Answer> {
    let address = |record: &Record| {
        if let RData::A(address) = &record.data {
            Some(IpAddr::V4(address.0))
        } else if let RData::AAAA(address) = &record.data {
            Some(IpAddr::V6(address.0))
        } else {
            None
        }
    };
    let addresses: Vec<_> = records.iter().filter_map(address).take(ADDRESSES_MAX).collect();
    let ttl = records.iter().map(|record| record.ttl).min()?;
    let ttl = Duration::from_secs(ttl.into()).min(POSITIVE_MAX);
    (!addresses.is_empty()).then_some(Answer { says: Says::Addresses(addresses), ttl })
}

/// An answer without address. Without SOA nothing says how long that holds (RFC 2308, 5).
fn none(says: Says, ttl: Option<u32>) -> Answer {
    Answer { says, ttl: Duration::from_secs(ttl.unwrap_or(0).into()).min(NEGATIVE_MAX) }
}

/// How long the absence of records holds (RFC 2308, 5).
fn negative_ttl(authorities: &[Record]) -> Option<u32> {
    authorities
        .iter()
        .find_map(|record| if let RData::SOA(soa) = &record.data { Some(record.ttl.min(soa.minimum)) } else { None })
}

/// A response code as people know it (RFC 1035, 4.1.1; IANA's names).
fn rcode(code: ResponseCode) -> String {
    format!("{code:?}").to_ascii_uppercase()
}

/// One question in each family, asked at once.
pub(super) async fn in_both_families(
    ipv4: BoxFuture<'_, Result<Answer, Failure>>,
    ipv6: BoxFuture<'_, Result<Answer, Failure>>,
) -> Result<Answer, Failure> {
    let (first, rest) = match select(ipv4, ipv6).await {
        Either::Left(ended) | Either::Right(ended) => ended,
    };
    let second = match &first {
        Ok(Answer { says: Says::Addresses(_), .. }) => {
            timeout(LATER_FAMILY, rest).await.unwrap_or(Err(Failure::Silent))
        }
        Ok(_) | Err(_) => rest.await,
    };
    join(first, second)
}

/// Addresses of one family are enough, but half an answer is not remembered for long. Without any, a failure counts
/// more than what the other family says: that there is no address is not known.
fn join(first: Result<Answer, Failure>, second: Result<Answer, Failure>) -> Result<Answer, Failure> {
    let (first, second) = match (first, second) {
        (Ok(first), Ok(second)) => (first, second),
        (Ok(Answer { says: says @ Says::Addresses(_), ttl }), Err(_))
        | (Err(_), Ok(Answer { says: says @ Says::Addresses(_), ttl })) => {
            return Ok(Answer { says, ttl: ttl.min(NEGATIVE_MAX) });
        }
        (Err(failure), _) | (_, Err(failure)) => return Err(failure),
    };
    let ttl = first.ttl.min(second.ttl);
    Ok(match (first.says, second.says) {
        (Says::Addresses(mut addresses), Says::Addresses(more)) => {
            // Neither family crowds out the other.
            addresses.truncate(ADDRESSES_MAX - more.len().min(ADDRESSES_MAX / 2));
            addresses.extend(more);
            addresses.truncate(ADDRESSES_MAX);
            Answer { says: Says::Addresses(addresses), ttl }
        }
        // The other family's absence is asked for again with the addresses.
        (says @ Says::Addresses(_), _) => Answer { says, ttl: first.ttl },
        (_, says @ Says::Addresses(_)) => Answer { says, ttl: second.ttl },
        (Says::NoName, _) | (_, Says::NoName) => Answer { says: Says::NoName, ttl },
        (Says::NoAddress, Says::NoAddress) => Answer { says: Says::NoAddress, ttl },
    })
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::Name;
    use hickory_proto::rr::rdata::{A, CNAME, SOA};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn message(code: ResponseCode, answers: Vec<Record>, authorities: Vec<Record>) -> Message {
        let mut message = Message::new(7, MessageType::Response, OpCode::Query);
        message.metadata.response_code = code;
        (message.answers, message.authorities) = (answers, authorities);
        message
    }

    fn a(ttl: u32, last: u8) -> Record {
        Record::from_rdata(name("end.example."), ttl, RData::A(A::new(10, 0, 0, last)))
    }

    fn cname(ttl: u32) -> Record {
        Record::from_rdata(name("www.example."), ttl, RData::CNAME(CNAME(name("end.example."))))
    }

    fn soa(ttl: u32, minimum: u32) -> Record {
        let soa = SOA::new(name("ns.example."), name("root.example."), 1, 1, 1, 1, minimum);
        Record::from_rdata(name("example."), ttl, RData::SOA(soa))
    }

    fn addresses(lasts: &[u8], seconds: u64) -> Answer {
        let addresses = lasts.iter().map(|last| [10, 0, 0, *last].into()).collect();
        Answer { says: Says::Addresses(addresses), ttl: Duration::from_secs(seconds) }
    }

    fn lacks(says: Says, seconds: u64) -> Answer {
        Answer { says, ttl: Duration::from_secs(seconds) }
    }

    #[test]
    fn the_end_of_a_chain_is_remembered_for_its_shortest_ttl_and_never_for_long() {
        let read = |answers| read(&message(ResponseCode::NoError, answers, vec![]));
        assert_eq!(read(vec![cname(20), a(60, 1), a(30, 2)]), Ok(addresses(&[1, 2], 20)));
        assert_eq!(read(vec![a(86_400, 1)]), Ok(addresses(&[1], 300)));
        assert_eq!(read(vec![a(0, 1)]), Ok(addresses(&[1], 0)));
        assert_eq!(read(vec![cname(20)]), Ok(lacks(Says::NoAddress, 0)));
    }

    #[test]
    fn absence_is_remembered_as_long_as_its_zone_says_and_never_for_long() {
        let read = |code, authorities| read(&message(code, vec![], authorities));
        assert_eq!(read(ResponseCode::NXDomain, vec![soa(60, 5)]), Ok(lacks(Says::NoName, 5)));
        assert_eq!(read(ResponseCode::NoError, vec![soa(3, 900)]), Ok(lacks(Says::NoAddress, 3)));
        assert_eq!(read(ResponseCode::NXDomain, vec![soa(900, 900)]), Ok(lacks(Says::NoName, 10)));
        assert_eq!(read(ResponseCode::NXDomain, vec![]), Ok(lacks(Says::NoName, 0)));
    }

    #[test]
    fn a_resolver_that_cannot_answer_says_how() {
        let read = |code| read(&message(code, vec![], vec![]));
        assert_eq!(read(ResponseCode::ServFail), Err(Failure::Answered("SERVFAIL".to_owned())));
        assert_eq!(read(ResponseCode::Refused), Err(Failure::Answered("REFUSED".to_owned())));
    }

    #[test]
    fn two_families_make_one_answer() {
        let failed = || Err(Failure::Answered("SERVFAIL".to_owned()));
        assert_eq!(join(Ok(addresses(&[1], 60)), Ok(addresses(&[2], 30))), Ok(addresses(&[1, 2], 30)));
        assert_eq!(join(Ok(lacks(Says::NoAddress, 0)), Ok(addresses(&[2], 30))), Ok(addresses(&[2], 30)));
        assert_eq!(join(Ok(addresses(&[1], 60)), Ok(lacks(Says::NoName, 5))), Ok(addresses(&[1], 60)));
        assert_eq!(join(Ok(addresses(&[1], 60)), failed()), Ok(addresses(&[1], 10)));
        assert_eq!(join(Err(Failure::Silent), Ok(lacks(Says::NoAddress, 5))), Err(Failure::Silent));
        let nothing = join(Ok(lacks(Says::NoAddress, 9)), Ok(lacks(Says::NoName, 5)));
        assert_eq!(nothing, Ok(lacks(Says::NoName, 5)));
    }

    #[test]
    fn of_a_long_answer_so_much_is_kept_of_both_families() {
        let long = |last| Says::Addresses(vec![[10, 0, 0, last].into(); ADDRESSES_MAX]);
        let answer = read(&message(ResponseCode::NoError, vec![a(60, 1); 1000], vec![])).unwrap();
        assert_eq!(answer.says, long(1));
        let joined = |other: Says| {
            let other = Answer { says: other, ttl: Duration::from_secs(60) };
            let Says::Addresses(joined) = join(Ok(answer.clone()), Ok(other)).unwrap().says else { panic!("found") };
            (joined.len(), joined.iter().filter(|ip| **ip == IpAddr::from([10, 0, 0, 2])).count())
        };
        assert_eq!(joined(long(2)), (ADDRESSES_MAX, ADDRESSES_MAX / 2));
        assert_eq!(joined(addresses(&[2], 60).says), (ADDRESSES_MAX, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_family_that_never_comes_holds_back_only_for_a_moment() {
        let begun = tokio::time::Instant::now();
        let found = Box::pin(async { Ok(addresses(&[1], 60)) });
        let never = Box::pin(std::future::pending());
        assert_eq!(in_both_families(found, never).await, Ok(addresses(&[1], 10)));
        assert_eq!(begun.elapsed(), LATER_FAMILY);
    }
}
