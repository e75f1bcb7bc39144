//! DNS as it was first (RFC 1035, 4.2): a question by UDP, and by TCP where the answer is too long for a datagram.
//!
//! Every question has a flow of its own. Whoever wants to forge its answer has to guess our port and its id (RFC 5452,
//! 9.2); what is no answer to it is passed over.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::answer::Failure;
use super::networks::{Flow, Network, Networks};

/// How long the first datagram waits for its answer before the question is asked again; the next wait twice as long
/// each, until the name's time is over: five datagrams.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The most octets of a UDP answer: what fits the tunnel's packets with room to spare. Source: RFC 9715, 3.
const UDP_ANSWER_MAX: u16 = 1232;

/// Puts one question. The caller bounds the time.
pub(super) async fn ask(
    networks: &Networks,
    server: SocketAddr,
    network: Network,
    mut question: Message,
) -> Result<Message, Failure> {
    question.metadata.id = rand::random();
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_ANSWER_MAX);
    question.set_edns(edns);
    let octets = question.to_vec().map_err(|error| Failure::Unreachable(error.to_string()))?;
    let answer = by_udp(networks, server, network, &question, &octets).await.map_err(unreachable)?;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    let octets = by_tcp(networks, server, network, &octets).await.map_err(unreachable)?;
    read_answer(&octets, &question).ok_or_else(|| Failure::Answered("nonsense".to_owned()))
}

async fn by_udp(
    networks: &Networks,
    server: SocketAddr,
    network: Network,
    question: &Message,
    octets: &[u8],
) -> io::Result<Message> {
    let mut flow = networks.open_udp(network, server).await?;
    let mut pause = FIRST_PAUSE;
    loop {
        flow.send(octets).await?;
        match timeout(pause, next_answer(&mut flow, question)).await {
            Ok(answer) => return answer,
            Err(_) => pause *= 2,
        }
    }
}

async fn next_answer(flow: &mut Flow, question: &Message) -> io::Result<Message> {
    loop {
        if let Some(answer) = read_answer(&flow.recv().await?, question) {
            return Ok(answer);
        }
    }
}

/// Puts the question on a connection of its own: long answers are rare. Each message has its length in front.
async fn by_tcp(networks: &Networks, server: SocketAddr, network: Network, octets: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(octets.len()).map_err(io::Error::other)?;
    let mut stream = networks.connect_server(network, server).await?;
    stream.write_all(&[&length.to_be_bytes(), octets].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// What `octets` hold, if they answer the question. Who did not understand it, or does not want to answer it, may leave
/// it out (RFC 1035, 4.1.1 and 7.3).
fn read_answer(octets: &[u8], question: &Message) -> Option<Message> {
    let answer = Message::from_vec(octets).ok()?;
    let code = answer.metadata.response_code;
    let refusals = [ResponseCode::FormErr, ResponseCode::NotImp, ResponseCode::ServFail, ResponseCode::Refused];
    let refused = answer.queries.is_empty() && refusals.contains(&code);
    let ours = answer.metadata.id == question.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && (answer.queries == question.queries || refused);
    ours.then_some(answer)
}

fn unreachable(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::TimedOut { Failure::Silent } else { Failure::Unreachable(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    fn question(name: &str, id: u16) -> Message {
        let mut question = Message::new(id, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        question
    }

    fn answers(answer: &Message, question: &Message) -> bool {
        read_answer(&answer.to_vec().unwrap(), question).is_some()
    }

    #[test]
    fn only_an_answer_to_this_very_question_counts() {
        let asked = question("a.example.", 7);
        assert!(!answers(&asked, &asked), "a question is no answer");
        assert!(answers(&asked.clone().into_response(), &asked));
        assert!(answers(&question("A.Example.", 7).into_response(), &asked), "names have no case");
        assert!(!answers(&question("b.example.", 7).into_response(), &asked));
        assert!(!answers(&question("a.example.", 8).into_response(), &asked));
        assert!(read_answer(b"\0\x07", &asked).is_none());
    }

    #[test]
    fn a_refusal_need_not_repeat_the_question() {
        let asked = question("a.example.", 7);
        let bare = |code| Message::error_msg(7, OpCode::Query, code);
        assert!(answers(&bare(ResponseCode::FormErr), &asked));
        assert!(!answers(&bare(ResponseCode::NoError), &asked));
    }
}
