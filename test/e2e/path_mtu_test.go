package e2e

import (
	"context"
	"errors"
	"flag"
	"testing"
	"time"

	"fairlead/maps"
	"fairlead/test/lab"
)

var pathBulk = flag.Int64("path-bulk", 16<<20, "bytes that go each way in TestPathMTU")

const (
	wholeMTU  = 1500
	narrowMTU = 1400
)

// TestPathMTU is bulk traffic over a stretch of 1400 bytes between two routers, in front of the edge and behind it. No end
// knows of it; routers say so by ICMP, about packets that the edge has changed: it finds whom it concerns. Everything goes
// on at the smaller size, and arrives whole.
func TestPathMTU(t *testing.T) {
	t.Parallel()
	for i, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			build, options := arms(lab.TwoArm), lab.Options{FrontMTU: wholeMTU, BackMTU: wholeMTU, Masquerade: i%4 > 1}
			if i%2 == 1 {
				build = lab.OneArm
			}
			if f.method == "dsr" {
				options.BackMTU = 0 // its backends are on the edge's own segment
			}
			testPathMTU(t, f, build, options)
		})
	}
}

func testPathMTU(t *testing.T, f form, build arms, options lab.Options) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, build, f, 2, options)
	p := &paths{t: t, ctx: ctx, form: f, topo: topo, web: s.at("tcp", httpPort), done: make(chan transfer, 1)}
	for _, b := range topo.Backends() {
		mustServeHTTP(t, b, p.done)
	}
	p.edge = newEdge(t, topo, interfacesOf(topo), "xdp: native")
	p.edge.write(p.web)
	p.edge.start()
	p.set = p.edge.open()

	// A tunnel's own headers make the way behind the edge a narrow one already.
	whole := wholeMTU - f.overhead()
	if f.tunnels() {
		p.forget(wholeMTU, wholeMTU)
		p.by("answer_too_big", func() { p.up(whole) })
	}
	p.forget(narrowMTU, wholeMTU)
	p.by("forward_icmp", func() { p.down(narrowMTU) })
	p.forget(narrowMTU, wholeMTU)
	p.up(min(narrowMTU, whole)) // here the clients' own router tells them
	if topo.Gate == nil {
		return
	}
	// What the edge learns of tunnels it does not forget: so this comes last.
	p.forget(wholeMTU, narrowMTU)
	if f.tunnels() {
		p.by("forward_icmp", func() { p.down(narrowMTU) }) // about what a backend sends as the service
		p.forget(wholeMTU, narrowMTU)
		p.by("pass_tunnel_error", func() {
			p.by("answer_too_big", func() { p.up(narrowMTU - f.overhead()) })
		})
		return
	}
	p.down(narrowMTU) // here the backends' own router tells them
	p.forget(wholeMTU, narrowMTU)
	p.by("reply_icmp", func() { p.up(narrowMTU) })
}

// paths is bulk traffic over stretches whose MTUs change.
type paths struct {
	t    *testing.T
	ctx  context.Context
	form form
	topo *lab.Topology
	web  service
	done chan transfer
	edge *edge
	set  *maps.Set
}

// forget sets the stretches' MTUs, and nobody has been told of any path yet.
func (p *paths) forget(front, back int) {
	p.t.Helper()
	err := p.topo.SetFrontMTU(front)
	if p.topo.Gate != nil {
		err = errors.Join(err, p.topo.SetBackMTU(back))
	}
	for _, n := range []*lab.Node{p.topo.Clients, p.topo.Near, p.topo.Router} {
		err = errors.Join(err, n.ForgetPaths())
	}
	for _, b := range p.topo.Backends() {
		err = errors.Join(err, b.ForgetPaths())
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// segment is the most that a segment holds where packets have so many bytes. Options take their part of it.
func (p *paths) segment(mtu int) uint32 {
	const ipv4, ipv6, tcp = 20, 40, 20
	if p.form.clients == 4 {
		return uint32(mtu - ipv4 - tcp)
	}
	return uint32(mtu - ipv6 - tcp)
}

// down has the clients fetch, and compares what the backend takes the path to be.
func (p *paths) down(mtu int) {
	p.t.Helper()
	const options = 40
	told := download(p.ctx, p.t, p.edge, p.topo, p.web, *pathBulk, p.done)
	most := p.segment(mtu)
	if told.info.Pmtu != uint32(mtu) || told.info.Snd_mss > most || told.info.Snd_mss < most-options {
		p.t.Errorf("%s sends over a path of %d bytes in segments of %d; want %d, and %d less options", told.backend,
			told.info.Pmtu, told.info.Snd_mss, mtu, most)
	}
	p.t.Logf("down: %d MiB in %v, in segments of %d", *pathBulk>>20, told.took.Round(time.Millisecond), told.info.Snd_mss)
}

// up has the clients send, and compares what they take the path to be, and what comes.
func (p *paths) up(mtu int) {
	p.t.Helper()
	told := uploadTo(p.ctx, p.t, p.edge, p.topo, p.web, *pathBulk, p.done)
	if most := p.segment(mtu); told.info.Rcv_mss > most {
		p.t.Errorf("segments of %d bytes came to %s, want %d at most", told.info.Rcv_mss, told.backend, most)
	}
	if path, err := p.topo.Clients.PathMTU(p.web.address); err != nil || path != mtu {
		p.t.Errorf("the clients take the path to %v to have %d bytes, %v, want %d", p.web.address, path, err, mtu)
	}
	p.t.Logf("up: %d MiB in %v, in segments of %d", *pathBulk>>20, told.took.Round(time.Millisecond), told.info.Rcv_mss)
}

// by runs a transfer and wants a verdict to have been given during it.
func (p *paths) by(verdict string, transfer func()) {
	p.t.Helper()
	before := p.edge.count(p.set, verdict)
	transfer()
	if p.edge.count(p.set, verdict) == before {
		p.t.Errorf("no packet had the verdict %s; %s", verdict, p.edge.story())
	}
}
