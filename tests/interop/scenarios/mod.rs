//! The scenarios, by subject. Each is one function that says in a sentence what must hold.

mod admission;
mod app_connectors;
mod browser;
mod closed;
mod conformance;
mod conn25;
mod connector_failures;
mod connector_routes;
mod control_faults;
mod control_group;
mod crowd;
mod exit_node;
mod failover;
mod idle;
mod join;
mod keys;
mod lasting;
mod leave;
mod link;
mod link_told;
mod link_v6;
mod names;
mod nat;
mod nat_changes;
mod paths;
mod ping;
mod provision;
mod relay;
mod relay_frozen;
mod routes;
mod shared;
mod transfer;
mod udp;

use std::time::Duration;

use libtest_mimic::Failed;

use crate::LIMIT;
use crate::bed::Bed;
use crate::hosts::Hosts;
use crate::namespace::Namespace;

/// What a scenario's end says about packets that left the sidecar's namespace.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Leaks {
    /// Any is a failure.
    None,
    /// Not looked at: the scenario sends some on purpose and checks by itself.
    Unchecked,
}

/// One scenario.
#[derive(Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Bed) -> Result<(), Failed>,
    /// When it has failed for taking too long.
    pub(crate) limit: Duration,
    pub(crate) leaks: Leaks,
    /// Whether it is tried again when it fails.
    pub(crate) may_fail_once: bool,
    /// The host whose packets are watched. The scenarios of one host run one after the other.
    pub(crate) host: fn(&Hosts) -> &Namespace,
}

impl Scenario {
    /// A scenario with the usual limit, that may leak nothing.
    const fn new(name: &'static str, run: fn(&Bed) -> Result<(), Failed>) -> Self {
        Self { name, run, limit: LIMIT, leaks: Leaks::None, may_fail_once: true, host: |hosts| &hosts.client }
    }

    /// The same, with another limit.
    const fn within(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// The same, without the leak check.
    const fn leaking(mut self) -> Self {
        self.leaks = Leaks::Unchecked;
        self
    }

    /// The same, without another try: it is about what never may leave, or never may be answered,
    /// or about octets that must be the right ones.
    const fn never(mut self) -> Self {
        self.may_fail_once = false;
        self
    }

    /// The same, on a host where no other scenario runs, beside those on `client`.
    const fn beside(mut self, host: fn(&Hosts) -> &Namespace) -> Self {
        self.host = host;
        self
    }
}

/// Names a function's scenario by its path: `subject::sentence`.
macro_rules! scenario {
    ($subject:ident :: $sentence:ident) => {
        Scenario::new(concat!(stringify!($subject), "::", stringify!($sentence)), $subject::$sentence)
    };
}

/// Long and quiet; first, so that they are done when the others are.
const BESIDE: [Scenario; 4] = [
    scenario!(lasting::a_connection_outlives_its_keys).within(330).beside(|hosts| &hosts.lasting),
    scenario!(idle::a_connection_outlives_its_mapping).within(200).leaking().beside(|hosts| &hosts.idle),
    scenario!(control_faults::a_silent_map_stream_is_given_up).within(200).beside(|hosts| &hosts.silent),
    scenario!(leave::a_killed_run_is_forgotten_by_the_server).within(260).beside(|hosts| &hosts.killed),
];

/// About app connectors, one after the other on a host of their own.
const APP_CONNECTORS: [Scenario; 12] = [
    scenario!(app_connectors::a_real_client_gets_the_page_when_it_tries_again).within(90).leaking(),
    scenario!(app_connectors::the_first_request_of_a_new_name_gets_its_page),
    scenario!(app_connectors::answers_of_every_shape_lead_to_their_site),
    scenario!(app_connectors::an_address_that_moves_is_followed_after_its_time),
    scenario!(app_connectors::a_connectors_no_is_told_and_nobody_else_is_asked).never(),
    scenario!(connector_routes::a_route_that_is_never_approved_has_its_code),
    scenario!(connector_routes::a_route_that_is_withdrawn_is_asked_for_anew),
    scenario!(connector_routes::an_address_of_two_connectors_is_served_by_either),
    scenario!(connector_routes::another_peers_wider_route_stands_in_and_the_log_says_so),
    scenario!(connector_failures::of_several_connectors_one_is_asked_and_an_offline_one_is_not),
    scenario!(connector_failures::a_connector_that_stops_is_replaced_until_it_is_back),
    scenario!(browser::chromium_loads_a_page_of_connector_names_that_nobody_knows).within(120),
];

/// About app connectors that are reached by transit addresses, on the same host.
const CONN25: [Scenario; 5] = [
    scenario!(conn25::a_real_client_and_a_plain_request_reach_an_app_by_transit_addresses).within(90).leaking(),
    scenario!(conn25::names_of_an_app_are_reached_at_once_and_without_a_route).never(),
    scenario!(conn25::a_connector_that_forgot_is_agreed_with_anew).never(),
    scenario!(conn25::another_connector_takes_over).within(90).never(),
    scenario!(conn25::an_app_that_no_connector_serves_fails_with_its_code).never(),
];

/// About a network that becomes another, one after the other on a host of their own.
const LINK: [Scenario; 11] = [
    scenario!(link::a_new_address_in_place_of_the_old_one_stops_no_download).within(90),
    scenario!(link::a_new_address_stops_no_relayed_download).within(90),
    scenario!(link::an_interface_that_goes_and_comes_back_stops_no_download).within(90),
    scenario!(link::a_gateway_that_knows_no_connection_stops_no_download).within(90),
    scenario!(link::a_filter_of_the_machine_that_drops_udp_stops_no_download).within(90),
    scenario!(link::a_firewall_that_forgets_connections_stops_no_relayed_download).within(90),
    scenario!(link::another_interface_stops_no_relayed_download).within(90),
    scenario!(link::a_new_address_stops_no_download_in_a_sandbox_without_netlink).within(90),
    scenario!(link::a_rule_that_moves_all_packets_stops_no_relayed_download).within(90),
    scenario!(link::a_download_goes_on_after_a_sleep).within(90),
    scenario!(link_told::control_is_told_addresses_as_they_come_and_go).within(90),
];

/// About relays that fail, one after the other on a host of their own.
const RELAY: [Scenario; 6] = [
    scenario!(relay::a_relay_that_stops_moves_the_home_and_control_hears_of_it).within(90),
    scenario!(relay::a_relay_with_another_certificate_is_left_for_another_region).within(90).never(),
    scenario!(relay::a_relay_that_restarts_is_awaited_as_it_wishes).within(90),
    scenario!(relay::a_problem_that_a_relay_tells_is_told_and_cleared),
    scenario!(relay::a_relay_that_limits_us_is_waited_for).within(90),
    scenario!(relay_frozen::a_home_relay_that_freezes_is_left_while_bytes_go_by_it).within(90),
];

const CONTROL_GROUP: [Scenario; 1] =
    [scenario!(control_group::a_real_client_reaches_the_web_peer_and_the_lan).leaking()];

const JOIN: [Scenario; 5] = [
    scenario!(join::an_ephemeral_key_becomes_an_online_tagged_node),
    scenario!(join::a_page_comes_by_socks_by_connect_and_as_a_plain_request),
    scenario!(join::ready_status_and_pid_files_say_what_stdout_says),
    scenario!(join::a_taken_hostname_is_renamed_by_the_server_and_both_work),
    scenario!(join::ten_sidecars_join_with_one_key_at_once),
];

const LEAVE: [Scenario; 8] = [
    scenario!(leave::signals_log_out),
    scenario!(leave::connections_that_are_cut_at_the_end_are_reset),
    scenario!(leave::the_end_of_stdin_logs_out_when_asked_for),
    scenario!(leave::exec_passes_the_code_on_and_logs_out),
    scenario!(leave::exec_passes_signals_both_ways),
    scenario!(leave::exec_tells_a_missing_command_from_a_wrong_one),
    scenario!(leave::an_unreachable_control_bounds_the_logout),
    scenario!(leave::a_second_signal_ends_it_at_once),
];

const ROUTES: [Scenario; 4] = [
    scenario!(routes::a_lan_behind_the_router_is_reached_by_address),
    scenario!(routes::a_withdrawn_route_ends_new_connections_with_its_code).never(),
    scenario!(routes::a_route_whose_router_is_offline_says_so).within(100),
    scenario!(routes::a_peer_that_never_handshakes_is_told_from_a_silent_host).within(90),
];

const FAILOVER: [Scenario; 3] = [
    scenario!(failover::the_router_that_control_names_next_is_used_at_once).within(90),
    scenario!(failover::a_silent_router_is_left_although_control_calls_it_online).within(220),
    scenario!(failover::the_longest_prefix_decides_between_two_routers).within(90),
];

const SHARED: [Scenario; 2] = [
    scenario!(shared::a_peer_that_knows_us_by_other_addresses_is_reached),
    scenario!(shared::a_name_of_another_tailnet_leads_to_its_peer),
];

const EXIT_NODE: [Scenario; 3] = [
    scenario!(exit_node::what_is_public_goes_by_the_exit_node_that_was_named).within(60).never(),
    scenario!(exit_node::an_exit_node_that_is_not_there_ends_the_run).within(60).never(),
    scenario!(exit_node::without_its_exit_node_nothing_public_is_reached).within(100).never(),
];

const NAMES: [Scenario; 8] = [
    scenario!(names::split_dns_names_lead_to_the_lan),
    scenario!(names::magic_dns_names_lead_to_peers),
    scenario!(names::a_renamed_peer_is_found_by_its_new_name),
    scenario!(names::each_failure_to_resolve_has_its_own_answer).within(90),
    scenario!(names::a_name_under_a_split_suffix_is_asked_nowhere_else).never(),
    scenario!(names::an_answer_is_remembered_for_its_time),
    scenario!(names::many_dials_of_one_name_ask_once),
    scenario!(names::odd_names_are_names),
];

const KEYS: [Scenario; 7] = [
    scenario!(keys::keys_that_the_server_refuses_end_the_run),
    scenario!(keys::a_tag_that_is_not_permitted_ends_the_run),
    scenario!(keys::a_control_server_that_is_not_there_is_temporary).leaking(),
    scenario!(keys::an_untrusted_certificate_ends_the_run).never(),
    scenario!(keys::an_authority_by_the_environment_is_trusted),
    scenario!(keys::plain_http_to_a_public_name_is_refused).never(),
    scenario!(keys::a_node_that_is_expired_mid_run_ends_with_that_reason),
];

const ADMISSION: [Scenario; 8] = [
    scenario!(admission::a_tailnet_lock_admits_who_is_signed).within(90).never(),
    scenario!(admission::a_wrapped_key_that_is_cut_short_is_told),
    scenario!(admission::a_device_joins_when_it_is_approved),
    scenario!(admission::a_device_that_is_not_approved_in_time_says_so),
    scenario!(admission::tags_are_compared_with_those_asked_for),
    scenario!(admission::a_deleted_node_comes_back).within(120),
    scenario!(admission::a_deleted_node_with_a_used_key_ends).within(90),
    scenario!(admission::an_expired_node_comes_back_with_another_key).within(90),
];

const CLOSED: [Scenario; 7] = [
    scenario!(closed::what_would_be_public_is_refused).never(),
    scenario!(closed::direct_allow_opens_what_it_names_and_no_more).leaking().never(),
    scenario!(closed::early_connections_are_held_until_ready_or_answered),
    scenario!(closed::a_connection_during_the_join_gets_its_page),
    scenario!(closed::a_control_outage_leaves_connections_alone),
    scenario!(closed::a_policy_change_closes_what_it_closes).never(),
    scenario!(closed::nothing_inbound_is_answered).never(),
];

const CONFORMANCE: [Scenario; 12] = [
    scenario!(conformance::socks_requests_beyond_connect_get_their_reply),
    scenario!(conformance::what_is_neither_protocol_is_turned_away),
    scenario!(conformance::socks_does_not_mind_how_bytes_arrive),
    scenario!(conformance::a_server_that_speaks_first_is_heard),
    scenario!(conformance::a_connection_carries_many_plain_requests),
    scenario!(conformance::hop_by_hop_fields_end_at_the_proxy),
    scenario!(conformance::expect_continue_is_answered_before_the_body),
    scenario!(conformance::a_websocket_echoes_both_ways_in),
    scenario!(conformance::bad_heads_are_answered),
    scenario!(conformance::a_slow_head_is_bounded).within(90),
    scenario!(conformance::curl_gets_pages_by_every_proxy_scheme),
    scenario!(conformance::credentials_are_asked_for_when_configured).never(),
];

const PATHS: [Scenario; 7] = [
    scenario!(relay::connections_go_on_while_control_and_relay_restart).within(120),
    scenario!(paths::on_one_lan_bytes_go_directly),
    scenario!(paths::a_relayed_connection_becomes_direct_without_breaking).within(120),
    scenario!(paths::a_direct_connection_survives_the_loss_of_udp),
    scenario!(paths::without_relays_the_end_of_udp_is_told_as_what_it_is),
    scenario!(paths::without_relays_a_network_without_udp_is_told_at_once),
    scenario!(paths::a_peer_homed_in_another_region_is_reached_there).never(),
];

const NAT: [Scenario; 13] = [
    scenario!(nat::every_pair_of_networks_gets_the_path_that_tailscaled_gets).within(120).leaking(),
    scenario!(nat::a_carriers_address_leads_directly_to_a_peer).within(90).leaking(),
    scenario!(nat::an_ipv6_address_without_a_route_delays_no_join).within(90).leaking(),
    scenario!(nat_changes::a_peer_that_restarts_is_found_in_seconds).within(90).leaking(),
    scenario!(nat_changes::a_nat_that_gets_another_address_interrupts_for_seconds).within(90).leaking(),
    scenario!(nat_changes::a_nat_that_forgets_its_mappings_interrupts_for_seconds).within(120).leaking(),
    scenario!(nat_changes::a_machine_that_refuses_datagrams_and_destroys_sockets_interrupts_for_moments)
        .within(120)
        .leaking(),
    scenario!(link_v6::newer_addresses_of_one_network_cut_nothing).within(90).leaking(),
    scenario!(link_v6::a_newer_route_by_the_same_link_cuts_nothing).within(90).leaking(),
    scenario!(link_v6::another_link_stops_no_relayed_download).within(90).leaking(),
    scenario!(link_v6::another_address_stops_no_relayed_download).within(90).leaking(),
    scenario!(link_v6::another_address_stops_no_download_and_is_told_to_peers).within(90).leaking(),
    scenario!(nat_changes::a_peer_whose_nat_gets_another_address_is_followed).within(120).leaking(),
];

const PING: [Scenario; 1] = [scenario!(ping::headscale_pings_the_node_and_is_answered)];

const PROVISION: [Scenario; 3] = [
    scenario!(provision::an_oauth_client_secret_becomes_a_tagged_node),
    scenario!(provision::a_workload_identity_becomes_a_tagged_node_while_control_is_dialled),
    scenario!(provision::a_made_key_that_control_refuses_is_taken_back),
];

const CONTROL_FAULTS: [Scenario; 13] = [
    scenario!(control_faults::a_map_in_pieces_and_with_unknown_fields_is_understood),
    scenario!(control_faults::a_map_is_understood_compressed_or_not),
    scenario!(control_faults::an_early_payload_is_read_over),
    scenario!(control_faults::a_broken_map_stream_is_opened_again).within(180),
    scenario!(control_faults::an_oversize_message_is_refused_at_its_length),
    scenario!(control_faults::constant_resets_do_not_make_a_busy_loop),
    scenario!(control_faults::a_map_that_never_comes_ends_the_join),
    scenario!(control_faults::deltas_do_what_whole_maps_would),
    scenario!(control_faults::patches_change_a_peers_key_and_endpoints),
    scenario!(control_faults::pings_and_echo_of_control_are_answered),
    scenario!(control_faults::ping_requests_lead_nowhere_but_to_control).never(),
    scenario!(control_faults::the_end_is_a_logout_that_control_sees),
    scenario!(control_faults::a_relay_with_another_pin_is_refused).never(),
];

const BROWSER: [Scenario; 2] = [
    scenario!(browser::chromium_loads_a_page_with_everything_on_it).within(180),
    scenario!(browser::chromium_gets_no_page_that_is_public).within(90).never(),
];

const CROWD: [Scenario; 3] = [
    scenario!(crowd::two_hundred_connections_at_once_keep_apart).never(),
    scenario!(crowd::two_thousand_short_connections_leave_room_for_more),
    scenario!(crowd::ten_thousand_peers_are_no_burden),
];

const TRANSFER: [Scenario; 9] = [
    scenario!(transfer::the_end_of_one_side_leaves_the_other_open),
    scenario!(transfer::a_reset_from_afar_is_a_reset_here),
    scenario!(transfer::a_reset_from_here_is_a_reset_there),
    scenario!(transfer::a_client_that_half_closed_is_waited_for_until_it_is_gone),
    scenario!(transfer::a_closed_port_is_refused_by_its_code),
    scenario!(transfer::a_reader_that_stops_is_waited_for),
    scenario!(transfer::a_thin_line_is_slow_and_whole),
    scenario!(transfer::a_gibibyte_arrives_whole).within(180).never(),
    scenario!(transfer::a_gibibyte_leaves_whole).within(180).never(),
];

const UDP: [Scenario; 6] = [
    scenario!(udp::datagrams_reach_the_lan_by_address_and_by_name),
    scenario!(udp::datagrams_during_the_join_are_held),
    scenario!(udp::public_datagrams_go_nowhere).never(),
    scenario!(udp::datagrams_are_as_long_as_one_packet_in_the_tunnel).within(90),
    scenario!(udp::a_withdrawn_route_ends_its_datagrams).within(90).never(),
    scenario!(udp::an_association_ends_with_its_connection),
];

/// All of them, in the order in which they begin.
pub(crate) fn all() -> impl Iterator<Item = Scenario> {
    let apps = APP_CONNECTORS.into_iter().chain(CONN25).map(|scenario| scenario.beside(|hosts| &hosts.apps));
    let relay = RELAY.into_iter().map(|scenario| scenario.beside(|hosts| &hosts.relayed));
    let on_client: [&[Scenario]; 21] = [
        &CONTROL_GROUP,
        &JOIN,
        &LEAVE,
        &ROUTES,
        &FAILOVER,
        &SHARED,
        &EXIT_NODE,
        &NAMES,
        &KEYS,
        &ADMISSION,
        &PROVISION,
        &CLOSED,
        &CONFORMANCE,
        &PATHS,
        &NAT,
        &PING,
        &CONTROL_FAULTS,
        &UDP,
        &BROWSER,
        &CROWD,
        &TRANSFER,
    ];
    let link = LINK.into_iter().map(|scenario| scenario.beside(|hosts| &hosts.link));
    let beside = BESIDE.into_iter().chain(apps).chain(link).chain(relay);
    beside.chain(on_client.into_iter().flatten().copied())
}
