package lab

import (
	"net/netip"
	"testing"
)

// Bulk flows in both directions and is compared; the end of a server is noted, and the other's connections go on.
func TestBulkClients(t *testing.T) {
	const each = 3
	ctx := t.Context()
	topology := mustOpen(t, OneArm, "bulk", Options{Backends: 2, ClientAddresses: 2})
	clients, err := topology.Clients.StartBulkClients()
	if err != nil {
		t.Fatal(err)
	}
	var servers []*Server
	for i, backend := range topology.Backends() {
		servers = append(servers, mustServer(t, backend.Node))
		family := families[i%2]
		if err := clients.Open(ctx, OpenOptions{
			Target: netip.AddrPortFrom(backend.Address(family), port), Sources: topology.ClientAddresses(family), Count: each,
		}); err != nil {
			t.Fatal(err)
		}
	}
	list := func() []IdleConnection {
		t.Helper()
		connections, err := clients.Connections(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return connections
	}
	const size, rate, most = 256 << 10, 32 << 20, 10
	if err := clients.Send(ctx, BulkOptions{Size: size, Rate: rate}); err != nil {
		t.Fatal(err)
	}
	if err := clients.Send(ctx, BulkOptions{}); err == nil {
		t.Error("those that send were told to send once more")
	}
	// echoed waits until every living connection of a server has so many more echoes.
	echoed := func(server string, more uint64) {
		t.Helper()
		before := map[netip.AddrPort]uint64{}
		for _, c := range list() {
			before[c.Local] = c.Echoed
		}
		await(t, "echoes", func() bool {
			for _, c := range list() {
				if c.Wrong != "" || c.Server == server && c.End != "" {
					t.Fatalf("%+v", c)
				}
				if c.Server == server && c.Echoed < before[c.Local]+more {
					return false
				}
			}
			return true
		})
	}
	echoed("ws1", most)
	echoed("ws2", most)
	if err := servers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "the killed server's connections to end", func() bool {
		got := ends(list(), "ws1")
		return got[EndReset]+got[EndClosed] == each
	})
	echoed("ws2", most)
	if got := ends(list(), "ws2"); got[""] != each {
		t.Errorf("ws2's: %v, want all to live", got)
	}
	if err := clients.Close(ctx); err != nil {
		t.Error(err)
	}
}
