//! The rows: one for each failure that a user can meet.
//!
//! A code is for ever: scripts and dashboards compare it. A row may be reworded, but what it stands for stays, and
//! the code of a row that is no longer needed is not given to another.

use super::{Row, Stage};

/// What a proxy client is told: SOCKS5 reply, HTTP status, `Proxy-Status` error.
struct Reply(u8, u16, &'static str);

// The pairs of product terms, in the order of the proxy's documentation. A method reply of FF and a closed
// connection have no reply field on the wire; their rows say 0xff and 1.
const NOT_JOINED_REPLY: Reply = Reply(1, 503, "destination_unavailable");
const DENIED_REPLY: Reply = Reply(2, 403, "http_request_denied");
const DNS_ERROR: Reply = Reply(4, 502, "dns_error");
const DNS_TIMEOUT: Reply = Reply(4, 504, "dns_timeout");
const UNROUTABLE: Reply = Reply(3, 502, "destination_ip_unroutable");
const SILENT_PEER: Reply = Reply(4, 504, "connection_timeout");
const SILENT_TARGET: Reply = Reply(6, 504, "connection_timeout");
const PROHIBITED: Reply = Reply(2, 502, "destination_ip_prohibited");
const RESET: Reply = Reply(5, 502, "connection_refused");
const CLOSED: Reply = Reply(1, 502, "connection_terminated");
const LIMIT: Reply = Reply(1, 503, "connection_limit_reached");
const UNSUPPORTED: Reply = Reply(7, 501, "http_request_error");
const METHOD_REPLY: Reply = Reply(7, 405, "http_request_error");
const ADDRESS_REPLY: Reply = Reply(8, 400, "http_request_error");
const BAD_REQUEST_REPLY: Reply = Reply(1, 400, "http_request_error");
const TOO_LARGE: Reply = Reply(1, 431, "http_request_error");
const TOO_SLOW: Reply = Reply(1, 408, "http_request_error");
const AUTHENTICATE: Reply = Reply(0xff, 407, "");
const LOOP_REPLY: Reply = Reply(2, 502, "proxy_loop_detected");
const BAD_ANSWER: Reply = Reply(1, 502, "http_protocol_error");
const BUG_REPLY: Reply = Reply(1, 500, "proxy_internal_error");

/// Whether another try may succeed although nobody changed anything.
mod again {
    pub(super) const YES: bool = true;
    pub(super) const NO: bool = false;
}

macro_rules! rows {
    ($($name:ident: $code:literal $stage:ident, exit $exit:literal, again $again:ident, $reply:ident
        $cause:literal
        $remedy:literal;)+) => {
        $(
            #[doc = concat!("`TC-", stringify!($code), "`: ", $cause, ".")]
            pub static $name: Row = Row {
                code: $code,
                stage: Stage::$stage,
                cause: $cause,
                remedy: $remedy,
                retryable: again::$again,
                exit: $exit,
                socks: $reply.0,
                http: $reply.1,
                proxy_status: $reply.2,
            };
        )+

        /// Every row, by code.
        pub static ALL: &[&Row] = &[$(&$name),+];
    };
}

rows! {
    KEY_EMPTY: 1001 Key, exit 65, again NO, NOT_JOINED_REPLY
        "the auth key is empty"
        "put the key into the file or variable that you named; `headscale preauthkeys create` or the admin console makes one";
    KEY_GARBLED: 1002 Key, exit 65, again NO, NOT_JOINED_REPLY
        "the auth key holds white space or unprintable characters"
        "give the key alone, on one line, without quotes or a name before it";
    KEY_OTHER_KIND: 1003 Key, exit 65, again NO, NOT_JOINED_REPLY
        "this secret is of another kind than an auth key"
        "make an auth key: `headscale preauthkeys create --ephemeral`, or Settings, Keys in the admin console";
    KEY_UNKNOWN_FORM: 1004 Key, exit 65, again NO, NOT_JOINED_REPLY
        "the auth key has an unknown form"
        "a key begins with tskey-auth-, tskey-client- or hskey-auth-, or is older hexadecimal; check that it was copied whole";
    KEY_FILE_MISSING: 1005 Key, exit 66, again NO, NOT_JOINED_REPLY
        "the secret's file does not exist"
        "check the path in --auth-key, --id-token or the variable, and that the secret is mounted";
    KEY_UNREADABLE: 1006 Key, exit 66, again NO, NOT_JOINED_REPLY
        "the secret cannot be read"
        "check that this user may read the file, or that somebody writes to the descriptor";
    KEY_ON_ARGV: 1007 Key, exit 64, again NO, NOT_JOINED_REPLY
        "an auth key on the command line can be read by every process of the machine"
        "use --auth-key file:PATH, --auth-key - (standard input), --auth-key-fd N or the variable TS_AUTHKEY, and revoke this key";
    KEY_NONE: 1008 Key, exit 64, again NO, NOT_JOINED_REPLY
        "no auth key was given"
        "set TS_AUTHKEY or TS_AUTHKEY_FILE, or use --auth-key file:PATH; or --client-id for workload identity";
    CLIENT_SECRET: 1009 Key, exit 77, again NO, NOT_JOINED_REPLY
        "the API does not accept the OAuth client secret"
        "check that the client still exists and the secret was copied whole; Settings, Trust credentials makes one";
    TOKEN_API_UNREACHABLE: 1010 Key, exit 75, again YES, NOT_JOINED_REPLY
        "the API that makes auth keys does not answer as it should"
        "check that this machine may reach it by HTTPS, or set --proxy; its words, if it had any, are in the cause";
    ID_TOKEN: 1011 Key, exit 77, again NO, NOT_JOINED_REPLY
        "the workload's ID token was refused"
        "check the federated client's issuer, subject and audience against the token, and that the token has not expired";
    TAGS_NEEDED: 1012 Key, exit 64, again NO, NOT_JOINED_REPLY
        "an auth key can only be made for tags"
        "name with --advertise-tags the tags that the OAuth or federated client has";
    MINT_REFUSED: 1013 Key, exit 77, again NO, NOT_JOINED_REPLY
        "the API refused to make an auth key"
        "give the client the scope auth_keys and each tag of --advertise-tags, or a tag that owns it";
    TOKEN_API_NOT: 1014 Key, exit 76, again NO, NOT_JOINED_REPLY
        "what answers is not the API that makes auth keys"
        "check baseURL or --login-server; name a private authority with --ca-file, else somebody may be intercepting";
    KEY_ATTRIBUTE: 1015 Key, exit 65, again NO, NOT_JOINED_REPLY
        "an attribute behind the ? of a client secret or id is wrong"
        "a secret takes ephemeral, preauthorized and baseURL, an id the first two: tskey-client-…?preauthorized=true";
    ID_TOKEN_NONE: 1016 Key, exit 64, again NO, NOT_JOINED_REPLY
        "there is no ID token for --client-id"
        "use --id-token file:PATH or TS_ID_TOKEN; or --audience in a GitHub Actions job with permissions: id-token: write";
    ID_TOKEN_MALFORMED: 1017 Key, exit 65, again NO, NOT_JOINED_REPLY
        "the ID token is not a JWT"
        "give the token alone, as the platform issued it: three parts with dots between";
    KEY_WRAPPING: 1018 Key, exit 65, again NO, NOT_JOINED_REPLY
        "the part of the auth key that the tailnet lock added cannot be used"
        "check that the key was copied whole, with all that follows --TL; `tailscale lock sign` on a signing node makes another";

    CONTROL_NAME: 1101 Control, exit 75, again YES, NOT_JOINED_REPLY
        "the control server's name has no address"
        "check --login-server, and that this machine's own DNS works";
    CONTROL_REFUSED: 1102 Control, exit 75, again YES, NOT_JOINED_REPLY
        "the control server cannot be connected to"
        "check --login-server and its port, and that a firewall lets this machine out, or set --proxy";
    CONTROL_SILENT: 1103 Control, exit 75, again YES, NOT_JOINED_REPLY
        "the control server does not answer"
        "check --login-server, and whether a firewall drops the packets; set --proxy if this network demands one";
    CONTROL_TLS: 1104 Control, exit 76, again NO, NOT_JOINED_REPLY
        "TLS with the control server failed"
        "if a private authority signed its certificate, name that with --ca-file; else somebody may be intercepting";
    CONTROL_NOT: 1105 Control, exit 76, again NO, NOT_JOINED_REPLY
        "what answers is not a control server"
        "check --login-server: the scheme, the port, and that no captive portal or web proxy answers instead";
    CONTROL_ERROR: 1106 Control, exit 75, again YES, NOT_JOINED_REPLY
        "the control server has an internal error"
        "try again later; look into the control server's log";
    CONTROL_NOISE: 1107 Control, exit 76, again NO, NOT_JOINED_REPLY
        "the encrypted session with the control server failed"
        "check that nothing on the way cuts or rewrites upgraded HTTP connections";
    CONTROL_PROTOCOL: 1108 Control, exit 76, again NO, NOT_JOINED_REPLY
        "the control server sent what cannot be understood"
        "check the control server's version, and report this with the log at --log-level debug";
    CONTROL_PLAIN: 1109 Control, exit 64, again NO, NOT_JOINED_REPLY
        "plain HTTP to a control server is only for loopback and private addresses"
        "write https:// in --login-server";
    NO_NETMAP: 1110 Control, exit 75, again YES, NOT_JOINED_REPLY
        "the control server accepted this node but sent no netmap"
        "try again; look into the control server's log";
    NOT_JOINED: 1111 Control, exit 75, again YES, NOT_JOINED_REPLY
        "this node has not joined the tailnet yet"
        "wait for the ready signal, or raise --hold-timeout; the log says what it waits for";

    KEY_NOT_KNOWN: 1201 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the control server does not accept the auth key"
        "check that the key belongs to this control server and was copied whole";
    KEY_EXPIRED: 1202 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the auth key has expired or was revoked"
        "make a new auth key";
    KEY_USED: 1203 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the single-use auth key was used already"
        "make a key for each run, or a reusable one";
    TAGS_REFUSED: 1204 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the control server does not permit the requested tags"
        "leave --advertise-tags out: the key's own tags apply; or give the key's owner these tags in tagOwners";
    LOGIN_NEEDED: 1205 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the control server asks a person to log in"
        "use a valid auth key: the one given did not count";
    APPROVAL_PENDING: 1206 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the device waits for an administrator's approval"
        "make the auth key pre-approved, or approve the device in the admin console";
    RATE_LIMITED: 1207 Register, exit 75, again YES, NOT_JOINED_REPLY
        "the control server limits registrations"
        "start fewer runs at once, or try again later";
    NODE_KEY_EXPIRED: 1208 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the control server calls a fresh node key expired"
        "check both machines' clocks and the key expiry in the tailnet's settings";
    REGISTER_REFUSED: 1209 Register, exit 77, again NO, NOT_JOINED_REPLY
        "the control server refused the registration"
        "its own words are in the cause; look into its log";
    LOCKED_OUT: 1210 Register, exit 77, again NO, NOT_JOINED_REPLY
        "tailnet lock is on and this node's key is not signed"
        "sign the node with `tailscale lock sign`, or use an auth key that was signed beforehand";
    TAGS_DIFFER: 1211 Register, exit 78, again NO, NOT_JOINED_REPLY
        "the tailnet granted other tags than those asked for"
        "give the key these tags, or let tagOwners permit them; --advertise-tags must name what the policy expects";

    HOME_DERP: 1301 Relay, exit 75, again YES, NOT_JOINED_REPLY
        "no home DERP could be connected"
        "check that this machine may reach the DERP servers by HTTPS, or set --proxy; --ca-file also holds for DERP";
    UNDERLAY_PROXY: 1302 Relay, exit 75, again YES, NOT_JOINED_REPLY
        "the HTTP proxy did not open a tunnel"
        "check --proxy or HTTPS_PROXY, its credentials, and that it allows CONNECT to this host";
    UNDERLAY_SOCKET: 1303 Relay, exit 71, again NO, NOT_JOINED_REPLY
        "the operating system refused a socket"
        "check the limits of open files and memory, and what the sandbox permits";
    UDP_BLOCKED: 1304 Relay, exit 75, again YES, NOT_JOINED_REPLY
        "no UDP comes back from anywhere, and --transport direct allows no relay"
        "let a firewall pass UDP to any port and its answers, or use --transport auto";

    DNS_NO_NAME: 1401 Dns, exit 68, again NO, DNS_ERROR
        "the name does not exist in the tailnet"
        "check the spelling, and the records of the resolver that answered";
    DNS_NO_ADDRESS: 1402 Dns, exit 68, again NO, DNS_ERROR
        "the name has no address"
        "add an A or AAAA record for it";
    DNS_FAILED: 1403 Dns, exit 68, again YES, DNS_ERROR
        "the resolver failed"
        "look into the log of the resolver that the cause names";
    DNS_SILENT: 1404 Dns, exit 68, again YES, DNS_TIMEOUT
        "the resolver does not answer"
        "check that it runs, and the peer before it if the cause names one, and that a grant lets this node reach its port 53";
    DNS_UNREACHABLE: 1405 Dns, exit 68, again YES, DNS_TIMEOUT
        "the resolver cannot be reached through the tailnet"
        "check that a peer routes its address, runs and is online (the cause names it), and that a grant covers it";
    DNS_BAD_NAME: 1406 Dns, exit 68, again NO, DNS_ERROR
        "this is not a DNS name"
        "check the spelling: labels of at most 63 characters, 253 in all";
    CONNECTOR_REFUSED: 1407 Dns, exit 68, again NO, DNS_ERROR
        "the app connector does not let this node ask for names"
        "let the policy give this node the connector's use: the same owner or tags, or a grant that covers 0.0.0.0 and :: port 53 there";

    ROUTE_NONE: 1501 Route, exit 78, again NO, UNROUTABLE
        "no node of the tailnet has or routes the address"
        "compare it with the tailnet's list of machines, and check that the policy lets this node see the one that has it";
    ROUTE_WITHDRAWN: 1502 Route, exit 69, again YES, UNROUTABLE
        "the route was withdrawn during this run"
        "check whether its router still advertises it and whether it is still approved";
    ROUTE_OFFLINE: 1503 Route, exit 69, again YES, UNROUTABLE
        "the router is offline"
        "start the router that the cause names, or add a second one";
    ROUTE_OF_ANSWER: 1504 Route, exit 78, again NO, UNROUTABLE
        "the name resolves to an address that no peer routes"
        "advertise and approve a subnet route that covers the answer";
    ROUTE_FAMILY: 1505 Route, exit 78, again NO, UNROUTABLE
        "this node has no address of that family"
        "use the target's other address, or let the tailnet assign both families";
    ROUTE_OF_CONNECTOR: 1506 Route, exit 78, again NO, UNROUTABLE
        "an app connector's route was not learned in time"
        "let autoApprovers.routes cover the connector's tag and this address; it runs with --advertise-connector, we with --accept-routes";
    NO_EXIT_NODE: 1507 Route, exit 78, again NO, UNROUTABLE
        "the exit node is not there"
        "check the spelling in --exit-node, and that control has approved the node's routes to everything (0.0.0.0/0, ::/0)";
    NO_TRANSIT: 1508 Route, exit 69, again YES, UNROUTABLE
        "no app connector agrees to a transit address"
        "check that a connector that the cause names runs and serves this app, and that a grant lets this node use it";

    PEER_SILENT: 1601 Peer, exit 69, again YES, SILENT_PEER
        "the peer does not answer"
        "check that it runs, and that the policy lets the two see each other";
    PEER_REJECTED: 1602 Peer, exit 78, again NO, PROHIBITED
        "the peer's packet filter rejected the connection"
        "add a grant from this node's tag to the target's address and port";
    TARGET_SILENT: 1604 Peer, exit 69, again YES, SILENT_TARGET
        "the target behind the peer does not answer"
        "likely the grant does not cover this address and port, or the peer cannot reach it";
    PEER_NOT_DIRECT: 1605 Peer, exit 69, again YES, SILENT_PEER
        "no direct path to the peer works, and --transport direct allows no relay"
        "let firewalls on both sides pass UDP to any port and its answers, or use --transport auto";

    TCP_REFUSED: 1701 Tcp, exit 69, again YES, RESET
        "the target refused the connection"
        "check that the service listens on this port";
    UPSTREAM_CLOSED: 1702 Tcp, exit 69, again YES, CLOSED
        "the target closed the connection midway"
        "look into the target's log";
    TCP_PORTS: 1703 Tcp, exit 71, again YES, LIMIT
        "no local port is free for this destination"
        "open fewer connections to one target at once";
    DIRECT_SILENT: 1704 Tcp, exit 69, again YES, SILENT_TARGET
        "the target outside the tailnet does not answer"
        "check that it runs, and that firewalls let this machine reach it: --direct-allow has it dialled outside the tailnet";
    DIRECT_FAILED: 1705 Tcp, exit 69, again YES, UNROUTABLE
        "the target outside the tailnet cannot be reached"
        "check this machine's own network; the cause has the operating system's words";

    UPSTREAM_PROTOCOL: 1801 Http, exit 76, again NO, BAD_ANSWER
        "the target's answer is not HTTP"
        "check the port; use https:// where the target speaks TLS";

    PUBLIC: 1901 Proxy, exit 78, again NO, DENIED_REPLY
        "the destination is not in the tailnet"
        "names need split DNS or an app connector, addresses an approved route that is accepted; --direct-allow lets them out";
    DENIED: 1902 Proxy, exit 78, again NO, DENIED_REPLY
        "a rule denies the destination"
        "change --allow or --deny";
    LOOP: 1903 Proxy, exit 78, again NO, LOOP_REPLY
        "the destination is this proxy itself"
        "take the proxy's own address out of what the client asks for";
    CREDENTIALS: 1904 Proxy, exit 77, again NO, AUTHENTICATE
        "the proxy's user name and password are missing or wrong"
        "give the client what the --proxy-auth file holds";
    TOO_MANY_CONNECTIONS: 1905 Proxy, exit 71, again YES, LIMIT
        "too many connections are open"
        "raise --max-connections, or find out which client leaves connections open";
    NOT_OFFERED: 1906 Proxy, exit 64, again NO, UNSUPPORTED
        "the proxy does not offer this way to a target"
        "use SOCKS5 CONNECT or UDP ASSOCIATE, or HTTP CONNECT; tell the browser --disable-quic";
    METHOD: 1907 Proxy, exit 64, again NO, METHOD_REPLY
        "the proxy does not carry this method"
        "use CONNECT, or another method";
    BAD_ADDRESS_TYPE: 1908 Proxy, exit 64, again NO, ADDRESS_REPLY
        "the address type is not IPv4, IPv6 or a domain name"
        "check the client's SOCKS5 settings";
    BAD_REQUEST: 1909 Proxy, exit 64, again NO, BAD_REQUEST_REPLY
        "the request is not one that a proxy understands"
        "this port speaks SOCKS5 and HTTP/1.1: check the client's proxy settings";
    HEAD_TOO_LARGE: 1910 Proxy, exit 64, again NO, TOO_LARGE
        "the request's head is larger than the proxy takes"
        "send smaller header fields, or use CONNECT, whose inner heads the proxy does not see";
    HEAD_TIMEOUT: 1911 Proxy, exit 64, again YES, TOO_SLOW
        "the request's head did not arrive in time"
        "send the whole head at once";
    SOCKS4: 1912 Proxy, exit 64, again NO, BAD_REQUEST_REPLY
        "SOCKS4 is not offered"
        "set the client to SOCKS5 (socks5h://), so that names are resolved in the tailnet";
    NOT_PROXY_FORM: 1913 Proxy, exit 64, again NO, BAD_REQUEST_REPLY
        "this is a proxy, not a web server"
        "set it as the client's HTTP proxy, or use CONNECT";
    SCHEME: 1914 Proxy, exit 64, again NO, BAD_REQUEST_REPLY
        "only http:// URLs are forwarded"
        "use CONNECT for https://";
    TRANSFER_CODING: 1915 Proxy, exit 64, again NO, UNSUPPORTED
        "the request's body has a transfer coding besides chunked"
        "send it chunked or with a length, or use CONNECT, which carries any bytes";

    JOIN_TIMEOUT: 2001 Run, exit 75, again YES, NOT_JOINED_REPLY
        "the node did not join in time"
        "raise --join-timeout, or look at --log-level debug to see what it waits for";
    NODE_EXPIRED: 2002 Run, exit 77, again NO, NOT_JOINED_REPLY
        "the node's key expired during the run"
        "start again with a valid auth key; disable key expiry for the tag if runs last longer";
    NODE_DELETED: 2003 Run, exit 74, again YES, NOT_JOINED_REPLY
        "the node was deleted from the tailnet during the run"
        "start again; find out who or what deletes nodes of this tag";
    BIND_FAILED: 2004 Run, exit 71, again NO, NOT_JOINED_REPLY
        "the proxy cannot listen"
        "choose a free port of a local address; port 0 takes any free one";
    FILE_NOT_WRITTEN: 2005 Run, exit 73, again NO, NOT_JOINED_REPLY
        "a file cannot be written"
        "check that its directory exists and that this user may write there";
    LOGOUT_UNCONFIRMED: 2006 Run, exit 80, again NO, NOT_JOINED_REPLY
        "the control server did not confirm the logout"
        "the node is ephemeral and disappears by itself; raise --logout-timeout if the server is slow";
    OS_REFUSED: 2007 Run, exit 71, again NO, NOT_JOINED_REPLY
        "the operating system refused"
        "check the limits of processes, memory and open files, and what the sandbox permits";
    INTERNAL: 2008 Run, exit 70, again NO, BUG_REPLY
        "tailcar has a bug"
        "please report this line";
    USAGE: 2009 Run, exit 64, again NO, NOT_JOINED_REPLY
        "the command line cannot be understood"
        "see `tailcar --help` and `tailcar run --help`";
    DRAINING: 2010 Run, exit 0, again YES, NOT_JOINED_REPLY
        "the sidecar is shutting down"
        "start a new one for a new run";
    SETTING: 2011 Run, exit 65, again NO, NOT_JOINED_REPLY
        "a setting's value is malformed"
        "see `tailcar run --help` for what the setting takes";
    SETTING_FILE: 2012 Run, exit 66, again NO, NOT_JOINED_REPLY
        "a file that a setting names cannot be read"
        "check the path, and that this user may read it";
    NOT_EXECUTABLE: 2013 Run, exit 126, again NO, NOT_JOINED_REPLY
        "the command cannot be executed"
        "check its permissions, and that it is a program for this machine";
    COMMAND_NOT_FOUND: 2014 Run, exit 127, again NO, NOT_JOINED_REPLY
        "the command was not found"
        "check its spelling and PATH";
    MAX_LIFETIME: 2015 Run, exit 0, again NO, NOT_JOINED_REPLY
        "the run lasted as long as --max-lifetime allows"
        "raise --max-lifetime if runs need longer";
    IDLE: 2016 Run, exit 0, again NO, NOT_JOINED_REPLY
        "no connection was open for as long as --idle-timeout allows"
        "raise --idle-timeout if pauses are longer";
    CA_FILE: 2017 Run, exit 65, again NO, NOT_JOINED_REPLY
        "the file of trusted certificates holds none, or something else"
        "name a PEM file with the authority's own certificate (BEGIN CERTIFICATE) in --ca-file or SSL_CERT_FILE";
}

#[cfg(test)]
mod tests;
