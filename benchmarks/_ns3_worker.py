"""Flows in ns-3, in an environment of its own: one JSON on stdin, seconds of each flow as JSON on stdout. See ns3_referee.py.

A leaf-spine network of point-to-point links; flows are TCP with a fixed window, queues without end, and no losses. A pinned flow goes to an
address of its host that only one spine has a route for; where flows are sprayed, routers draw a next hop for every packet.
"""

import json
import os
import sys

SOURCE = r"""
#include "ns3/applications-module.h"
#include "ns3/core-module.h"
#include "ns3/internet-module.h"
#include "ns3/network-module.h"
#include "ns3/point-to-point-module.h"
#include "ns3/traffic-control-module.h"
#include <algorithm>
#include <cstdio>
#include <vector>

namespace referee {
using namespace ns3;

std::vector<double> lastByte;

void
Arrived(uint32_t flow, Ptr<const Packet>, const Address&)
{
    lastByte[flow] = Simulator::Now().GetSeconds();
}

Ipv4Address
Text(int a, int b, int c, int d)
{
    char text[32];
    std::snprintf(text, sizeof(text), "%d.%d.%d.%d", a, b, c, d);
    return Ipv4Address(text);
}

struct End
{
    uint32_t interface;
    Ipv4Address own, other;
};

int cables = 0;

End
AddEnd(Ptr<NetDevice> device, Ipv4Address own, Ipv4Address other)
{
    Ptr<Ipv4> ipv4 = device->GetNode()->GetObject<Ipv4>();
    uint32_t place = ipv4->AddInterface(device);
    ipv4->AddAddress(place, Ipv4InterfaceAddress(own, Ipv4Mask("255.255.255.0")));
    ipv4->SetMetric(place, 1);
    ipv4->SetUp(place);
    return End{place, own, other};
}

std::pair<End, End>
Join(PointToPointHelper& helper, Ptr<Node> a, Ptr<Node> b)
{
    NetDeviceContainer devices = helper.Install(a, b);
    int number = cables++;
    Ipv4Address first = Text(11, number / 256, number % 256, 1), second = Text(11, number / 256, number % 256, 2);
    return {AddEnd(devices.Get(0), first, second), AddEnd(devices.Get(1), second, first)};
}

std::vector<double>
Run(int leaves, int spines, int each, double gbps, int delayNs, bool isSprayed, bool takesTurns, int segment, int window, int seed,
    std::vector<int> src, std::vector<int> dst, std::vector<int> path, std::vector<int> size)
{
    RngSeedManager::SetSeed(seed + 1);
    Config::SetDefault("ns3::TcpSocket::SegmentSize", UintegerValue(segment));
    Config::SetDefault("ns3::TcpSocket::InitialCwnd", UintegerValue(window));
    Config::SetDefault("ns3::TcpSocket::DelAckCount", UintegerValue(1));
    Config::SetDefault("ns3::TcpSocket::SndBufSize", UintegerValue(1 << 28));
    Config::SetDefault("ns3::TcpSocket::RcvBufSize", UintegerValue(window * segment));
    Config::SetDefault("ns3::TcpSocketBase::Timestamp", BooleanValue(false));
    // Packets that come out of order are no sign of losses here. Without SACK ns-3 takes them for losses whatever the threshold is.
    Config::SetDefault("ns3::TcpSocketBase::Sack", BooleanValue(true));
    Config::SetDefault("ns3::TcpSocketBase::ReTxThreshold", UintegerValue(1000000));
    Config::SetDefault("ns3::Ipv4GlobalRouting::RandomEcmpRouting", BooleanValue(isSprayed));

    NodeContainer hosts, tops, backs;
    hosts.Create(leaves * each);
    tops.Create(leaves);
    backs.Create(spines);
    InternetStackHelper stack;
    stack.Install(hosts);
    stack.Install(tops);
    stack.Install(backs);
    PointToPointHelper helper;
    helper.SetDeviceAttribute("DataRate", DataRateValue(DataRate(uint64_t(gbps * 1e9))));
    helper.SetDeviceAttribute("Mtu", UintegerValue(segment + 200));
    helper.SetChannelAttribute("Delay", TimeValue(NanoSeconds(delayNs)));
    helper.SetQueue("ns3::DropTailQueue<Packet>", "MaxSize", StringValue("1000000p"));

    Ipv4StaticRoutingHelper routing;
    auto table = [&](Ptr<Node> node) { return routing.GetStaticRouting(node->GetObject<Ipv4>()); };
    auto alias = [&](int host, int spine) { return Text(10, 100 + spine, host / each, host % each + 1); };
    std::vector<Ipv4Address> own(leaves * each);
    for (int host = 0; host < leaves * each; host++)
    {
        Ptr<Node> node = hosts.Get(host), leaf = tops.Get(host / each);
        auto [up, down] = Join(helper, node, leaf);
        own[host] = up.own;
        if (takesTurns)
        {
            // A queue for each connection (two whose hashes are alike would share one), served in turn; CoDel's drops are set so that
            // there are none.
            Ptr<PointToPointNetDevice> card = DynamicCast<PointToPointNetDevice>(node->GetObject<Ipv4>()->GetNetDevice(up.interface));
            card->GetQueue()->SetMaxSize(QueueSize("1p"));
            TrafficControlHelper turns;
            StringValue most("1000000p"), never("10s");
            BooleanValue apart(true);
            turns.SetRootQueueDisc("ns3::FqCoDelQueueDisc", "MaxSize", most, "Interval", never, "Target", never,
                                   "EnableSetAssociativeHash", apart);
            turns.Install(NetDeviceContainer(card));
        }
        if (isSprayed)
        {
            continue;
        }
        table(node)->SetDefaultRoute(up.other, up.interface);
        for (int spine = 0; spine < spines; spine++)
        {
            Ipv4InterfaceAddress named(alias(host, spine), Ipv4Mask("255.255.255.255"));
            node->GetObject<Ipv4>()->AddAddress(up.interface, named);
            table(leaf)->AddHostRouteTo(alias(host, spine), down.other, down.interface);
        }
    }
    for (int leaf = 0; leaf < leaves; leaf++)
    {
        for (int spine = 0; spine < spines; spine++)
        {
            auto [up, down] = Join(helper, tops.Get(leaf), backs.Get(spine));
            if (isSprayed)
            {
                continue;
            }
            Ipv4Address everybody = Text(10, 100 + spine, 0, 0), rack = Text(10, 100 + spine, leaf, 0);
            table(tops.Get(leaf))->AddNetworkRouteTo(everybody, Ipv4Mask("255.255.0.0"), up.other, up.interface);
            table(backs.Get(spine))->AddNetworkRouteTo(rack, Ipv4Mask("255.255.255.0"), down.other, down.interface);
            // Acknowledgements go to the address that TCP chose, a host's first, over any spine.
            for (int host = 0; host < leaves * each; host++)
            {
                if (host / each == leaf)
                {
                    table(backs.Get(spine))->AddHostRouteTo(own[host], down.other, down.interface);
                }
                else if (host % spines == spine)
                {
                    table(tops.Get(leaf))->AddHostRouteTo(own[host], up.other, up.interface);
                }
            }
        }
    }
    if (isSprayed)
    {
        Ipv4GlobalRoutingHelper::PopulateRoutingTables();
    }

    lastByte.assign(src.size(), -1.0);
    Time beginning = MilliSeconds(10);
    for (uint32_t flow = 0; flow < src.size(); flow++)
    {
        Ipv4Address to = isSprayed ? own[dst[flow]] : alias(dst[flow], path[flow]);
        uint16_t port = 5000 + flow;
        PacketSinkHelper sink("ns3::TcpSocketFactory", InetSocketAddress(Ipv4Address::GetAny(), port));
        ApplicationContainer sinks = sink.Install(hosts.Get(dst[flow]));
        sinks.Get(0)->TraceConnectWithoutContext("Rx", MakeBoundCallback(&Arrived, flow));
        Ptr<Socket> socket = Socket::CreateSocket(hosts.Get(src[flow]), TcpSocketFactory::GetTypeId());
        socket->Bind();
        Simulator::Schedule(Seconds(0), [socket, to, port]() { socket->Connect(InetSocketAddress(to, port)); });
        // All at once, when every connection stands: an answer to the first packet of another would wait behind what a host sends.
        int bytes = size[flow];
        Simulator::Schedule(beginning, [socket, bytes, segment]() {
            for (int left = bytes; left > 0; left -= segment)
            {
                socket->Send(Create<Packet>(std::min(left, segment)));
            }
        });
    }
    Simulator::Stop(Seconds(10));
    Simulator::Run();
    Simulator::Destroy();
    for (double& seconds : lastByte)
    {
        seconds -= seconds < 0 ? 0 : beginning.GetSeconds();
    }
    return lastByte;
}
} // namespace referee
"""


def main() -> None:
    # ns-3's loader prints on stdout.
    answer = os.dup(1)
    os.dup2(2, 1)
    import cppyy
    from ns import ns  # noqa: F401  loads the libraries

    cppyy.cppdef(SOURCE)
    job = json.load(sys.stdin)
    flows = [[row[place] for row in job["flows"]] for place in range(4)]
    names = (
        "leaves",
        "spines",
        "hosts_per_leaf",
        "gbps",
        "latency_ns",
        "is_sprayed",
        "takes_turns",
        "segment",
        "window",
        "seed",
    )
    found = cppyy.gbl.referee.Run(*(job[name] for name in names), *flows)
    with os.fdopen(answer, "w") as file:
        json.dump(list(found), file)


if __name__ == "__main__":
    main()
