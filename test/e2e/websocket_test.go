package e2e

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"fairlead/test/lab"
)

func TestSmoke(t *testing.T) {
	topo, err := lab.TwoArm("e2esmoke", lab.Options{Backends: 3, ClientAddresses: 4})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { topo.Close() })
	s := service{address: topo.Services[0], port: 8000, method: "fullnat"}
	for _, b := range topo.Backends() {
		if _, err := b.StartServer(lab.ServerOptions{Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:8000")}}); err != nil {
			t.Fatal(err)
		}
		s.backends = append(s.backends, backend{b.Name(), b.Address(s.address), 1})
	}
	e := newEdge(t, topo, "interfaces: [front, back]")
	e.write(s)
	e.start()
	clients, err := topo.Clients.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := clients.Open(ctx, lab.OpenOptions{Target: s.addrPort(), Sources: topo.ClientAddresses(s.address), Count: 300}); err != nil {
		set := e.open()
		tot, _ := set.Counters.Totals()
		t.Fatal(err, tot, e.log())
	}
	stats, err := clients.Stats(ctx)
	t.Logf("%+v %v\n%s", stats, err, e.log())
}
